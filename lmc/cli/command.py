"""The arguments of each command, and `main`."""

import argparse
import sys
from collections.abc import Callable, Sequence

from lmc.cli import actions
from lmc.core.files import __version__
from lmc.errors import InputError, LmcError

ABOUT = """Find what may move, choose the move, look at the landscape, combine the weights.

Models are folders as transformers, diffusers and timm write them, .safetensors files, or files of torch.save without code
in them; what was unwrapped is printed. Every command is a thin skin on the Python call of the same name."""

INSPECT = """Compare models before merging: do they fit, are they relatives, do they agree, and what to do then.

examples:
  lmc inspect math/ code/ --base base/
  lmc inspect math/ code/ --base base/ --layers          one line per layer
  lmc inspect a.safetensors b.safetensors --model "mlp(64, [64, 64, 64], 10)" --data digits

In Python: lmc.merge.inspect(models, base=base, model=..., data=...)"""

MERGE = """Merge models into a new folder, tensor by tensor, with little memory.

An interrupted merge goes on where it stopped when the same command is given again; the result is the same, bit for bit.
Files are called as those of the first model. Beside them are merge.json (the recipe, the version of lmc, and the SHA-256
of every file read and written) and the configuration and tokenizer of the base, or else of the first model.

examples:
  lmc merge average a/ b/ c/ --out soup/
  lmc merge ties math/ code/ --base base/ --out merged/ --set density=0.2 --set scale=1.0
  lmc merge task_arithmetic math/ code/ --base base/ --out merged/ --set 'scale={"*": 0.5, "model.layers.3": 0.2}'
  lmc merge lines math/ code/ --base base/ --out merged/ --set method=ties --set density=0.3
  lmc merge ties math/ code/ --base base/ --out merged/ --dry-run      say what it takes, and stop
  lmc merge --explain ties                                             what a method does, and its options
  lmc merge --recipe merged/merge.json --out again/                    the same again, bit for bit
  lmc merge --recipe config.yml --out merged/ --folder org/model=a/    a configuration of mergekit
  lmc merge my_methods:median a/ b/ c/ --out merged/                   a function of your own, @lmc.merge.on_tensors

In Python: lmc.merge.write(method, models, out, base=..., **options), lmc.merge.replay(recipe, out)

"""

EXTRACT = """Make a LoRA adapter of a fine-tuned model, or of the merge of several models or adapters.

examples:
  lmc extract fine-tuned/ --base base/ --rank 16 --out adapter/
  lmc extract adapter-a/ adapter-b/ --base base/ --method ties --set density=0.3 --rank 32 --out merged-adapter/

What is lost of each weight is printed. In Python: lmc.merge.extract(models, out, base=base, rank=rank)"""

ALIGN = """Bring the units of B into the order of A's: what B computes stays the same, and the two can be merged.

examples:
  lmc align a.safetensors b.safetensors --model "mlp(64, [64, 64, 64], 10)" --data digits --out b-aligned/
  lmc align a/ b/ --model my_package.models:net(width=64) --example 2,3,32,32 --out b-aligned/
  lmc align a/ b/ --spec spec.json --out b-aligned/ --set restarts=4
  lmc align a/ b/ --model "mlp(64, [64], 10)" --data digits --method activation_matching --out b-aligned/

Weight matching reads tensors as it needs them: neither model has to fit into memory, and --model may give a module on
the meta device. An interrupted search goes on where it stopped when the same command is given again.

--model imports and runs code that you name. In Python: lmc.permutation_spec(model, inputs),
lmc.weight_matching(spec, "a/", "b/"), pi.apply(lmc.open_checkpoint("b/"))"""

CONNECT = """Move B onto A by whatever connects the two best, and say what that is.

examples:
  lmc connect a.safetensors b.safetensors --model "mlp(64, [64, 64, 64], 10)" --data digits
  lmc connect a/ b/ --model my_package.models:net(width=64) --data images.npz --budget 300 --out b-connected/ --html path.html

Where the normalisations of A had to be folded, it is written too, beside B: --out-a. An interrupt gives the best so far.
--model imports and runs code that you name. In Python: lmc.connect(model, a, b, data)"""

BARRIER = """Loss and accuracy on the straight line between two networks.

examples:
  lmc barrier a.safetensors b.safetensors --model "mlp(64, [64, 64, 64], 10)" --data digits
  lmc barrier a/ b-aligned/ --model my_package.models:net(width=64) --data images.npz --html path.html
  lmc barrier a/ b/ --model my_package.models:net --data tokens.npz --task language

Arrays in a file of data are called inputs and targets, or train_inputs, train_targets, test_inputs and test_targets; or as
the arguments of the module, with labels. --model, --data and --task import and run code that you name.
In Python: lmc.loss_path(model, a, b, lmc.Task.language().on(data))"""

DATA = "a data set of lmc.data, module:function(arguments), or a file .npz or .safetensors"
TASK = "how the data are judged (default: classes): regression, segmentation, 'language('bits')', ... or module:task"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 1 where something failed, 2 where the command was wrong."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except InputError as error:
        return _failed(error, 2)
    except (LmcError, OSError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        goes_on = arguments.run is actions.merge
        goes_on |= arguments.run is actions.align and arguments.method == "weight_matching"
        return _failed("interrupted" + "; the same command goes on where this one stopped" * goes_on, 130)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lmc", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"lmc {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _inspect(_command(commands, "inspect", INSPECT, actions.inspect))
    _merge(_command(commands, "merge", MERGE, actions.merge, actions.catalogue))
    _extract(_command(commands, "extract", EXTRACT, actions.extract))
    _align(_command(commands, "align", ALIGN, actions.align))
    _connect(_command(commands, "connect", CONNECT, actions.connect))
    _barrier(_command(commands, "barrier", BARRIER, actions.barrier))
    return top


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with what `more` gives, which is asked for when the help is printed."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        return super().format_help() + ("" if self.more is None else f"\n{self.more()}\n")


def _command(commands, name: str, text: str, run, more: Callable[[], str] | None = None) -> argparse.ArgumentParser:
    about, _, examples = text.partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=about, description=about, epilog=examples, formatter_class=style)
    command.set_defaults(run=run)
    command.more = more
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    return command


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", nargs="+", metavar="MODEL")
    command.add_argument("--base", help="what the models were fine-tuned from")
    command.add_argument("--layers", action="store_true", help="print a line for each layer")
    command.add_argument("--model", help="the architecture, module:factory(arguments), for barriers on --data")
    command.add_argument("--data", help=DATA)
    command.add_argument("--task", help=TASK)


def _merge(command: argparse.ArgumentParser) -> None:
    command.add_argument("method", nargs="?", metavar="METHOD", help="one of the methods below, or module:function")
    command.add_argument("models", nargs="*", metavar="MODEL")
    command.add_argument("--base", help="what the models were fine-tuned from")
    command.add_argument("--out", help="the folder to make; it must not exist")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the method")
    command.add_argument("--dtype", help="of the result, such as bfloat16 (default: as in the first model)")
    command.add_argument("--vocabulary", choices=("union", "base"), help="merge by token where tokenizers differ")
    command.add_argument(
        "--shard-size", default=actions.SHARD_SIZE, help="bytes per file at most (default %(default)s)"
    )
    command.add_argument("--workers", type=int, default=1, help="processes that make tensors (default 1)")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    command.add_argument("--recipe", metavar="FILE", help="do the merge of a merge.json, or of a mergekit config.yml")
    command.add_argument("--folder", action="append", default=[], metavar="NAME=DIR", help="where a recipe's model is")
    command.add_argument("--save-recipe", metavar="FILE", help="write a copy of the recipe there")
    command.add_argument("--explain", metavar="METHOD", help="print what a method does and its options")


def _extract(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", nargs="+", metavar="MODEL", help="a fine-tuned model or an adapter")
    command.add_argument("--base", required=True, help="what the models were fine-tuned from")
    command.add_argument("--out", required=True, help="the folder to make; it must not exist")
    command.add_argument("--rank", type=int, default=16, help="of the factors at most (default 16)")
    command.add_argument("--method", default="task_arithmetic", help="how several models are merged")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the method")
    command.add_argument("--dtype", default="float32", help="of what is stored (default float32)")
    command.add_argument("--layers", action="store_true", help="print a line for each weight")


def _align(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help="the model that stays")
    command.add_argument("b", metavar="B", help="the model whose units are moved")
    command.add_argument("--out", required=True, help="the folder to make, with B as moved")
    command.add_argument("--method", default="weight_matching", choices=sorted(actions.ALIGNERS))
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the method")
    command.add_argument("--model", help="the architecture, module:factory(arguments)")
    command.add_argument("--data", help=DATA)
    command.add_argument("--task", help=TASK)
    command.add_argument("--example", metavar="SIZES", help="shape of example inputs such as 2,3,32,32, without --data")
    command.add_argument("--spec", metavar="FILE", help="a PermutationSpec saved as JSON, instead of --model")
    command.add_argument("--save-permutation", metavar="FILE", help="write the permutation as JSON")


def _connect(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help="the model that stays")
    command.add_argument("b", metavar="B", help="the model that is moved")
    command.add_argument("--model", required=True, help="the architecture, module:factory(arguments)")
    command.add_argument("--data", required=True, help=DATA)
    command.add_argument("--task", help=TASK)
    command.add_argument("--budget", type=float, default=120.0, help="seconds that it may take (default 120)")
    command.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    command.add_argument("--spec", metavar="FILE", help="a PermutationSpec saved as JSON (default: found)")
    command.add_argument("--out", help="the folder to make, with B as moved")
    command.add_argument("--out-a", help="the folder to make, with A as B was moved onto it")
    command.add_argument("--html", metavar="FILE", help="save the explorer of both ways as a page")


def _barrier(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.add_argument("--model", required=True, help="the architecture, module:factory(arguments)")
    command.add_argument("--data", required=True, help=DATA)
    command.add_argument("--task", help=TASK)
    command.add_argument("--alphas", type=int, default=25, help="points on the line (default 25)")
    command.add_argument("--html", metavar="FILE", help="save the explorer of the path as a page")


def _failed(error: object, status: int) -> int:
    print("lmc: " + " ".join(str(error).split()), file=sys.stderr)
    return status
