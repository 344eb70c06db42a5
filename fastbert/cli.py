"""The commands: `fastbert pretrain`, `finetune`, `predict`, `prepare`, `prepare similar-words`, `convert`, `bench`,
`info`.

Every option is a field of an option class of fastbert.train.config; a command adds no settings of its own. `bench`
reads its own command line.
"""

import argparse
import os
import shlex
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

from fastbert.errors import ConfigError, FastBertError
from fastbert.finetune.options import DemoOptions, FinetuneConfig, PredictConfig
from fastbert.train.config import (
    ConvertConfig,
    PrepareConfig,
    PretrainConfig,
    RecipeOptions,
    SimilarWordsConfig,
    default_of,
    grouped_fields,
    nearest,
    scalar_type,
)
from fastbert.train.recipes import recipes
from fastbert.train.yaml_text import parse_yaml

_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for an error that the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:2] == _SIMILAR_WORDS.split():
        argv = [_SIMILAR_WORDS, *argv[2:]]
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
        ("pretrain", _pretrain, (RecipeOptions, PretrainConfig), _PRETRAIN),
        ("finetune", _finetune, (DemoOptions, FinetuneConfig), _FINETUNE),
        ("predict", _predict, (PredictConfig,), _PREDICT),
        ("prepare", _prepare, (PrepareConfig,), _PREPARE),
        (_SIMILAR_WORDS, _similar_words, (SimilarWordsConfig,), _SIMILAR),
        ("convert", _convert, (ConvertConfig,), _CONVERT),
        ("info", _info, (), _INFO),
    ):
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0].partition(". ")[0].rstrip("."),
            description=text,
            usage=f"fastbert {name} [options]",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if options:
            command.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
        if run is _info:
            command.add_argument("--json", action="store_true", help="print it as JSON, for programs")
        entries = [entry for kind in options for entry in _add_options(command, kind)]
        command.set_defaults(run=run, flags=[_flag(entry) for entry in entries])
    commands.add_parser("bench", help="Measure ops and models beside what users would pick otherwise")
    return parser


_INFO = """\
Show versions, devices, and which backend serves each op and why.

The first thing to paste into a report. Each op is called once, as small as can be, on the GPU if there is one, in the
dtype that training uses there. Nothing is compiled for it."""
_SIMILAR_WORDS = "prepare similar-words"
_PRETRAIN = f"""\
Pretrain a model. Without --data, --files, --recipe and --config: the demonstration, a small model on the
People's Daily in some minutes (--variant bert|roberta|albert|nezha|electra|roformer).

  fastbert pretrain                                                     the demonstration
  fastbert pretrain --files a.txt b.txt --out runs/a --epochs 3         from raw text
  fastbert pretrain --data corpus --preset bert-small --out runs/b      from a prepared corpus
  fastbert pretrain --out runs/b --resume                               after an interrupt
  fastbert pretrain --recipe macbert-base --data corpus --explain       what a published recipe does and needs
  fastbert pretrain --recipe macbert-base --demo                        the recipe in small, in a minute
  torchrun --nproc-per-node 8 -m fastbert pretrain --data corpus ...    on eight GPUs

recipes:
{textwrap.fill(", ".join(recipes()), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)}
"""
_FINETUNE = """\
Fine-tune a pretrained model: to classify texts or pairs, to tag words, to find answers.

  fastbert finetune --demo sentiment                             a worked example on real data (sentiment, ner, pos)
  fastbert finetune --task classification --model M --train a.csv --test b.csv --out runs/c
  fastbert finetune --task classification --model M --train pairs.tsv --columns text=sentence1 text_pair=sentence2
  fastbert finetune --task tagging --model M --train ner.conll --validation dev.conll --seeds 0 1 2
  fastbert finetune --task qa --model M --train cmrc2018_train.json --validation cmrc2018_dev.json --max-length 384
  torchrun --nproc-per-node 8 -m fastbert finetune ...                  on eight GPUs
"""
_PREDICT = """\
Predict with a fine-tuned model. One JSON object a line, in the order of the texts.

  fastbert predict --model runs/c/model --text "房间很干净"
  fastbert predict --model runs/c/model --files new.csv --out predictions.jsonl
  fastbert predict --model runs/c/model --files test.csv --labelled --out predictions.jsonl
"""
_PREPARE = """\
Turn text files into a folder of token shards, for pretrain --data. See also: fastbert prepare similar-words.
"""
_SIMILAR = """\
Make a table of similar words, for pretrain --masking macbert. From one of: vectors, a thesaurus, your text.

  fastbert prepare similar-words --vectors words.vector --out similar.txt
  fastbert prepare similar-words --cilin cilin.txt --out similar.txt
  fastbert prepare similar-words --text a.txt --words rjieba --out similar.txt
"""
_CONVERT = """\
Make one model folder of another.

  fastbert convert --from-tensorflow --model chinese_L-12_H-768_A-12 --out bert-base-chinese
  fastbert convert --from-fairseq --model roberta.base --out roberta-base
  fastbert convert --to-words --model chinese-roberta-wwm-ext --files a.txt --count 20000 --out wobert
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
    try:
        return name, parse_yaml(value, name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _settings(options: argparse.Namespace, *kinds: type) -> list[dict]:
    """What the file and the command line set of each option class; the command line wins."""
    given = [{name: value for name, value in vars(options).items() if name in _names(kind)} for kind in kinds]
    for kind, own in zip(kinds, given, strict=True):
        for entry in fields(kind):
            if entry.name in own and scalar_type(entry)[0] is dict:
                own[entry.name] = dict(own[entry.name])
    if options.config is None:
        return given
    values = kinds[-1].read_yaml(options.config)
    for kind, own in zip(kinds[:-1], given[:-1], strict=True):
        found = {name: values.pop(name) for name in _names(kind) & set(values)}
        own.update(found | own)
        kind.from_dict(own, f"config file {options.config}")
    kinds[-1].check(values, f"config file {options.config}")
    return [*given[:-1], values | given[-1]]


def _names(kind: type) -> set[str]:
    return set(kind.__dataclass_fields__)


def _pretrain(options: argparse.Namespace, argv: list[str]) -> int:
    from fastbert.train import demo, pretrain, recipe_demo, run_recipe
    from fastbert.train.resume import begun_config

    recipe, settings = _settings(options, RecipeOptions, PretrainConfig)
    recipe = RecipeOptions(**recipe)
    if recipe.explain and (recipe.recipe is None or recipe.demo):
        raise ConfigError(f"explain is set with recipe {recipe.recipe} and demo {recipe.demo}, expected a recipe alone")
    if recipe.recipe is not None:
        result = recipe_demo(recipe.recipe, settings) if recipe.demo else None
        if not recipe.demo:
            result = run_recipe(recipe.recipe, recipe.explain, **settings)
    else:
        if settings.get("resume") and "out" in settings:
            settings = begun_config(Path(settings["out"])) | settings
        own_text = options.config or settings.get("data") or settings.get("files")
        result = pretrain(PretrainConfig(**settings)) if own_text and not recipe.demo else demo(settings)
    if result is None or not result.interrupted:
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


def _finetune(options: argparse.Namespace, _argv: list[str]) -> int:
    from fastbert.finetune import demo, finetune

    given, settings = _settings(options, DemoOptions, FinetuneConfig)
    given = DemoOptions(**given)
    if given.demo is not None:
        results = demo(given.demo, settings, given.limit).values()
    elif given.limit is not None:
        raise ConfigError(f"limit is {given.limit}, which does nothing: it goes with a demo")
    else:
        results = [finetune(FinetuneConfig(**settings))]
    return _INTERRUPTED if not results or any(result.interrupted for result in results) else 0


def _predict(options: argparse.Namespace, _argv: list[str]) -> int:
    from fastbert.finetune.command import predict_files

    return predict_files(PredictConfig(**_settings(options, PredictConfig)[0]))


def _prepare(options: argparse.Namespace, _argv: list[str]) -> int:
    from fastbert.train.setup import prepare_text

    config = PrepareConfig(**_settings(options, PrepareConfig)[0])
    own = ("overwrite", "shard_tokens", "unit_bytes", "processes")
    print(prepare_text(config, Path(config.out), **{name: getattr(config, name) for name in own}))
    return 0


def _similar_words(options: argparse.Namespace, _argv: list[str]) -> int:
    from fastbert.data import build_similar_words

    (given,) = _settings(options, SimilarWordsConfig)
    config = SimilarWordsConfig(**given)
    sources = {"vectors": config.vectors, "cilin": config.cilin, "text": config.text or None}
    if config.text and config.words is None:
        raise ConfigError("words is not set, expected with text how it is cut into words, such as rjieba")
    more = {name: value for name, value in given.items() if name not in (*sources, "out", "overwrite")}
    print(build_similar_words(config.out, **sources, overwrite=config.overwrite, **more))
    print(f"{config.out}: for fastbert pretrain --similar-words")
    return 0


def _convert(options: argparse.Namespace, _argv: list[str]) -> int:
    (given,) = _settings(options, ConvertConfig)
    config = ConvertConfig(**given)
    chosen = [kind for kind in _CONVERSIONS if getattr(config, kind)]
    if len(chosen) != 1:
        known = ", ".join(f"--{kind.replace('_', '-')}" for kind in _CONVERSIONS)
        raise ConfigError(f"got {len(chosen)} conversions to do, expected one of {known}")
    for name in ("model", "out"):
        if getattr(config, name) is None:
            raise ConfigError(f"{name} is not set, expected a model folder")
    convert, own = _CONVERSIONS[chosen[0]]
    for name in given:
        if name not in (*_CONVERSIONS, "model", "out", *own):
            raise ConfigError(f"{name} is {given[name]!r}, expected it not to be set with {chosen[0]}")
    convert(config)
    if not (Path(config.out) / "tokenizer_config.json").is_file():
        print(f"no tokenizer was written: none of the vocabularies that are known is beside {config.model}")
    return 0


def _convert_tensorflow(config: ConvertConfig) -> None:
    from fastbert.train.from_tensorflow import from_tensorflow

    for done in from_tensorflow(config.model, config.out, variant=config.variant, activation=config.activation):
        act = f"hidden_act {done.config.hidden_act}"
        if done.config.hidden_act != done.written_act:
            act += f" ({config.activation}; the config beside it says {done.written_act or 'nothing'})"
        print(f"{done.folder}: {done.kind.__name__} of {config.model}, {act}")


def _convert_fairseq(config: ConvertConfig) -> None:
    from fastbert.train.from_fairseq import from_fairseq

    print(f"{config.out}: {type(from_fairseq(config.model, config.out)).__name__} of {config.model}")


def _convert_to_words(config: ConvertConfig) -> None:
    from fastbert.data import frequent_words
    from fastbert.train.words import to_words

    if (config.word_list is None) == (not config.files):
        raise ConfigError(f"word_list is {config.word_list!r} and files is {config.files!r}, expected one of the two")
    own = ("count", "words", "tag_separator", "min_frequency", "errors")
    words = config.word_list or frequent_words(config.files, **{name: getattr(config, name) for name in own})
    tokenizer = to_words(config.model, config.out, words=words, pad_to_multiple_of=config.pad_vocab_to)
    added = tokenizer.vocab_size - tokenizer.reduced().vocab_size
    print(f"{config.out}: {config.model} with {tokenizer.vocab_size:,} tokens, {added:,} new words; train on from here")


# What fastbert convert can do -> the function and its own options.
_CONVERSIONS = {
    "from_tensorflow": (_convert_tensorflow, ("variant", "activation")),
    "from_fairseq": (_convert_fairseq, ()),
    "to_words": (
        _convert_to_words,
        ("word_list", "files", "words", "tag_separator", "count", "min_frequency", "errors", "pad_vocab_to"),
    ),
}


def _info(options: argparse.Namespace, _argv: list[str]) -> int:
    from fastbert import info

    print((info.as_json if options.json else info.as_text)(info.collect()))
    return 0
