"""What the browser tests do again and again: write a notebook, wait for the kernel, drag, look at pixels."""

import ast
import time

import nbformat

# Small random networks: nothing is trained, and every picture has hills.
NETWORKS = """
import torch, lmc
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
model = lmc.models.mlp(16, [8], 3)
def weights():
    return {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
a, b, c = weights(), weights(), weights()
data = torch.randn(200, 1, 4, 4, generator=generator), torch.randint(3, (200,), generator=generator)
"""


def write(server, name: str, *sources: str) -> str:
    """A notebook among the copied ones; gives its name."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), server.notebooks / name)
    return name


def until(notebook, expression: str, accept):
    """The value of an expression in the kernel, once it is accepted."""
    end = time.monotonic() + 30
    while not accept(found := ast.literal_eval(notebook.ask(expression))):
        assert time.monotonic() < end, f"{expression} is still {found}"
        notebook.page.wait_for_timeout(50)
    return found


def drag(page, element, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one place on an element to another, given in shares of its size."""
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=8)
    page.mouse.up()


def pixels(canvas) -> int:
    """A number that tells one picture on a canvas from another."""
    return canvas.evaluate(
        """canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return data.reduce((sum, value, i) => (sum * 31 + value * (i % 97)) % 1000000007, 7);
        }"""
    )


def changes(page, before, look, *arguments) -> None:
    """Wait until `look(*arguments)` gives something else than `before`."""
    end = time.monotonic() + 20
    while look(*arguments) == before:
        assert time.monotonic() < end, f"still {before}"
        page.wait_for_timeout(30)
