"""The commands: `fastbert pretrain`, `fastbert prepare`, `fastbert bench`, `fastbert info`.

Every option is a field of an option class of fastbert.train.config; a command adds no settings of its own. `bench`
reads its own command line.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import yaml

from fastbert import backend, extension
from fastbert.errors import ConfigError, FastBertError
from fastbert.train.config import PrepareConfig, PretrainConfig, default_of, grouped_fields, nearest, scalar_type

_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for an error that the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        from fastbert.benchmarks.cli import main as bench

        return bench(argv[1:])
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    try:
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}{nearest(unknown[0], options.flags)}")
        return options.run(options, argv)
    except KeyboardInterrupt:
        print("\nstopped at once; what was saved before stands", file=sys.stderr)
        return _INTERRUPTED
    except (FastBertError, OSError) as error:
        if options.debug or os.environ.get("FASTBERT_DEBUG") == "1":
            raise
        print(f"fastbert {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastbert", description="BERT-family encoders: from raw text to a pretrained model.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, run, options, text in (
        ("pretrain", _pretrain, PretrainConfig, _PRETRAIN),
        ("prepare", _prepare, PrepareConfig, "Turn text files into a folder of token shards, for pretrain --data."),
        ("info", _info, None, "Show versions, devices, and which backend serves each op and why."),
    ):
        command = commands.add_parser(
            name,
            help=text.split(". ")[0].rstrip("."),
            description=text,
            usage=f"fastbert {name} [options]",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        entries = []
        if options is not None:
            command.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
            entries = _add_options(command, options)
        command.set_defaults(run=run, flags=[_flag(entry) for entry in entries])
    commands.add_parser("bench", help="Measure ops and models beside what users would pick otherwise")
    return parser


_PRETRAIN = """\
Pretrain a masked language model. Without --data, --files and --config: the demonstration, a small model
on the People's Daily in some minutes (--variant bert|roberta|albert|nezha|electra|roformer).

  fastbert pretrain                                                     the demonstration
  fastbert pretrain --files a.txt b.txt --out runs/a --epochs 3         from raw text
  fastbert pretrain --data corpus --preset bert-small --out runs/b      from a prepared corpus
  fastbert pretrain --out runs/b --resume                               after an interrupt
  torchrun --nproc-per-node 8 -m fastbert pretrain --data corpus ...    on eight GPUs
"""


def _add_options(parser: argparse.ArgumentParser, options: type) -> list:
    for title, entries in grouped_fields(options):
        group = parser.add_argument_group(title.rstrip("."))
        for entry in entries:
            kind, _ = scalar_type(entry)
            default = default_of(entry)
            shown = "none" if default in (None, [], {}) else default
            shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
            meaning = f"{entry.metadata['help']} (default: {shown})".replace("%", "%%")
            form = {"type": kind, "metavar": kind.__name__.upper()}
            if entry.metadata["choices"]:
                form = {"metavar": "{" + ",".join(filter(None, entry.metadata["choices"])) + "}"}
            if kind is bool:
                form = {"action": argparse.BooleanOptionalAction}
            elif kind is dict:
                form = {"type": _assignment, "nargs": "+", "metavar": "FIELD=VALUE"}
            elif isinstance(default, list):
                form |= {"nargs": "+"}
            elif isinstance(default, tuple):
                form |= {"nargs": len(default)}
            group.add_argument(_flag(entry), dest=entry.name, default=argparse.SUPPRESS, help=meaning, **form)
    return [entry for _, entries in grouped_fields(options) for entry in entries]


def _flag(entry) -> str:
    return "--" + entry.name.replace("_", "-")


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    return name, yaml.safe_load(value)


def _settings(options: argparse.Namespace, kind: type) -> dict:
    """What the file and the command line set; the command line wins."""
    given = {name: value for name, value in vars(options).items() if name in kind.__dataclass_fields__}
    if "model" in given:
        given["model"] = dict(given["model"])
    if options.config is None:
        return given
    values = kind.read_yaml(options.config)
    kind.from_dict(values, f"config file {options.config}")
    return values | given


def _pretrain(options: argparse.Namespace, argv: list[str]) -> int:
    from fastbert.train import demo, pretrain
    from fastbert.train.setup import begun_config

    settings = _settings(options, PretrainConfig)
    if settings.get("resume") and "out" in settings:
        settings = begun_config(Path(settings["out"])) | settings
    if options.config or settings.get("data") or settings.get("files"):
        result = pretrain(PretrainConfig(**settings))
    else:
        result = demo(settings)
    if not result.interrupted:
        return 0
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"stopped after step {result.step}; to go on:\n  {_resume_command(argv)}", flush=True)
    return _INTERRUPTED


def _resume_command(argv: list[str]) -> str:
    arguments = [argument for argument in argv if argument not in ("--overwrite", "--resume")] + ["--resume"]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1:
        return shlex.join(["torchrun", "--nproc-per-node", str(processes), "-m", "fastbert", *arguments])
    program = [sys.argv[0]] if Path(sys.argv[0]).name == "fastbert" else [Path(sys.executable).name, "-m", "fastbert"]
    return shlex.join(program + arguments)


def _prepare(options: argparse.Namespace, _argv: list[str]) -> int:
    from fastbert.train.setup import prepare_text

    config = PrepareConfig(**_settings(options, PrepareConfig))
    report = prepare_text(config, Path(config.out), overwrite=config.overwrite, shard_tokens=config.shard_tokens)
    print(report)
    return 0


_AT_FIRST_USE = "it is compiled at first use (FASTBERT_BUILD=0 forbids it)"


def _info(_options: argparse.Namespace, _argv: list[str]) -> int:
    import torch

    from fastbert.train.setup import device_name, versions
    from fastbert.train.world import resolve_device

    device = resolve_device("auto")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"device: {device_name(device)}; GPUs: {torch.cuda.device_count()}; CPU threads: {torch.get_num_threads()}")
    print(f"extension: {extension.where() or f'not built; {extension.obstacle() or _AT_FIRST_USE}'}")
    print(f"triton: {'installed' if find_spec('triton') else 'not installed'}")
    print(f"{backend.VARIABLE}: {os.environ.get(backend.VARIABLE) or 'not set'}\n")
    for name, call in _tiny_calls(device).items():
        with mock.patch.dict(os.environ, FASTBERT_BUILD="0"):
            chosen, reasons = _choice(name, call)
        print(f"{name:<24} {chosen:<10} {'; '.join(f'not {other}: {why}' for other, why in reasons.items())}")
    return 0


def _choice(op: str, call: Callable) -> tuple[str, dict[str, str]]:
    """Which backend a call of an op runs on, and why each that cannot serve cannot: what the op itself asks."""
    found = {}

    def pick(op, predicates, asked, *arguments):
        reasons = {name: predicate(*arguments) for name, predicate in predicates.items()}
        found["reasons"] = {name: reason for name, reason in reasons.items() if reason}
        found["chosen"] = backend.pick(op, predicates, asked, *arguments)
        return found["chosen"]

    module = import_module(f"fastbert.ops.{op}")
    with mock.patch.object(module if hasattr(module, "pick") else module.sequences, "pick", pick):
        call()
    return found["chosen"], found["reasons"]


def _tiny_calls(device) -> dict[str, Callable]:
    """A call of every op, with the dtype that training uses on the device."""
    import torch

    from fastbert import ops

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, x, w = (torch.ones(shape, device=device, dtype=dtype) for shape in ((1, 16, 1, 64), (16, 64), (64,)))
    ids = torch.zeros(16, dtype=torch.int64, device=device)
    thrice = torch.ones(192, 64, device=device, dtype=dtype)
    layer = ops.LayerWeights(thrice, thrice[:, 0], thrice[:64], w, w, w, thrice[:64], w, thrice[:64], w, w, w)
    lists = {name: [torch.ones(64, device=device)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    return {
        "attention": lambda: ops.attention(q, q, q),
        "rotary_attention": lambda: ops.rotary_attention(q, q, q),
        "relative_attention": lambda: ops.relative_attention(q, q, q),
        "dropout_add_layer_norm": lambda: ops.dropout_add_layer_norm(x, x, w, w),
        "bias_gelu": lambda: ops.bias_gelu(x, w),
        "embedding_layer_norm": lambda: ops.embedding_layer_norm(ids, x, w, w),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, x, x[:, 0], ids),
        "encoder_layers": lambda: ops.encoder_layers(x[None], [layer], ops.attention, heads=1),
        "lamb": lambda: ops.lamb([ops.LambGroup(**lists, steps=[torch.ones(1, device=device)], lr=0.0)]),
    }
