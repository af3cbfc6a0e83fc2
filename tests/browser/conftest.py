"""JupyterLab and a headless Chromium, for tests that look at what a reader sees.

Everything runs on this machine alone: the page may not reach any other address, and every attempt is an error. Without
a Chromium these tests are skipped, except in CI, where its absence is an error.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--no-first-run",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip
HERE = ("http://127.0.0.1:", "ws://127.0.0.1:", "file:", "data:", "blob:")
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    # Cells outside the window stay in the page, so that a test finds their outputs.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
KERNEL_IDLE = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A running headless browser, with a home of its own."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        message = f"no browser on the PATH (looked for {', '.join(PROGRAMS)})"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with sync_playwright() as playwright:
        home = {"HOME": str(tmp_path_factory.mktemp("home"))}
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS, env=os.environ | home)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def profile(chromium) -> Iterator[Any]:
    """What all windows share: pages find in its cache what those before them have loaded and compiled."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1400})
    context.set_default_timeout(60_000)
    yield context
    context.close()


@dataclass
class Window:
    """Pages of a browser that reaches this machine only; it remembers what went wrong in them."""

    context: Any
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def open(self, address: str) -> Any:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(address)
        return page

    def note(self, request) -> None:
        """Keep the address of a request to another machine."""
        if not request.url.startswith(HERE):
            self.outside.append(request.url)


@pytest.fixture
def window(profile, tmp_path) -> Iterator[Window]:
    """A window of its own; the test fails if one of its pages asks for another machine or has an error of its own.

    What its pages looked like at the end is left in the test's `tmp_path`.
    """
    opened = Window(profile)
    profile.on("request", opened.note)
    yield opened
    profile.remove_listener("request", opened.note)
    for i, page in enumerate(list(profile.pages)):
        page.screenshot(path=tmp_path / f"page{i}.png")
        page.close()
    assert not opened.outside, f"a page asked for {opened.outside}"
    assert not opened.errors, f"errors in a page: {opened.errors}"


@dataclass(frozen=True)
class Server:
    """A JupyterLab server over a copy of the notebooks, so that no test changes the stored ones."""

    address: str
    token: str
    notebooks: Path


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """JupyterLab on a free port of this machine, with the repository's `data/` beside the copied notebooks."""
    home = tmp_path_factory.mktemp("lab")
    notebooks = home / "site" / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (home / "site" / "data").symlink_to(ROOT / "data", target_is_directory=True)
    extension = home / "data" / "labextensions" / "lmc-lab"  # where an installed package has it, too
    extension.parent.mkdir(parents=True)
    extension.symlink_to(ROOT / "lmc" / "views" / "lab", target_is_directory=True)
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "run"}
    with open(home / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
             "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
             f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'site'}",
             "--ServerApp.terminals_enabled=False", "--LabApp.extension_manager=readonly",
             "--LabApp.expose_app_in_browser=True"],
            env=os.environ | {name: str(home / folder) for name, folder in folders.items()},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, f"{address}/api/status?token={token}", home / "server.log")
        yield Server(address, token, notebooks)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@dataclass(frozen=True)
class Notebook:
    """One notebook, open in JupyterLab, with its kernel idle."""

    page: Any

    def run_all(self) -> None:
        """Run every cell; returns when the last one has its reply."""
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(KERNEL_IDLE)

    def ask(self, expression: str) -> str:
        """The repr of a Python expression in the notebook's kernel."""
        return self.page.evaluate(
            """async (expression) => {
                const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
                const content = { code: "", silent: false, store_history: false, user_expressions: { it: expression } };
                const reply = (await kernel.requestExecute(content).done).content.user_expressions.it;
                return reply.status === "ok" ? reply.data["text/plain"] : reply.evalue;
            }""",
            expression,
        )

    @property
    def cells(self) -> list[dict]:
        """The cells as they would be stored now."""
        return self.page.evaluate("window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")

    @property
    def errors(self) -> list[str]:
        """Name and message of every error among the outputs."""
        outputs = [output for cell in self.cells for output in cell.get("outputs", [])]
        return [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]


@pytest.fixture
def open_notebook(server, window) -> Iterator[Callable[[str], Notebook]]:
    """A function that opens one of the copied notebooks by its file name."""
    opened = []

    def open_one(name: str) -> Notebook:
        page = window.open(f"{server.address}/lab/tree/notebooks/{name}?token={server.token}&reset")
        opened.append(page)
        page.wait_for_function(KERNEL_IDLE)
        return Notebook(page)

    yield open_one
    for page in opened:
        # A kernel outlives its page; the next test would be served by the modules that it has loaded.
        page.evaluate("window.jupyterapp.shell.currentWidget?.sessionContext.shutdown()")
