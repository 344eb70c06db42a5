"""`fastbert predict`: from files, a text, or stdin to JSON lines."""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from fastbert.errors import ConfigError, DataError
from fastbert.finetune.examples import Example, read_examples
from fastbert.finetune.options import PredictConfig
from fastbert.finetune.predict import Predictor
from fastbert.train import state


def predict_files(config: PredictConfig) -> int:
    """Predicts what `config` names, and returns the exit code."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    out = None if config.out is None else Path(config.out)
    if out is not None and out.exists() and not config.overwrite:
        raise ConfigError(f"out {config.out!r} exists already; overwrite it, or choose another file")
    if config.labelled and not config.files:
        raise ConfigError("labelled is set without files, expected files with labels")
    predictor = Predictor(config.model, config.device, config.precision)
    examples = _examples(config, predictor)
    count = len(predictor.task.samples(examples)) if examples else 0
    with tqdm(total=count, unit="sample", disable=not sys.stderr.isatty() or not count) as bar:
        predictions = predictor.predict(examples, config.batch_size, bar.update)
    lines = [_line(example, prediction) for example, prediction in zip(examples, predictions, strict=True)]
    if out is None:
        sys.stdout.writelines(lines)
        sys.stdout.flush()
    else:
        state.write_text(out, "".join(lines))
        print(f"{out}: {len(lines):,} predictions", file=sys.stderr)
    if config.labelled:
        print(predictor.score(examples, predictions), file=sys.stderr)
    return 0


def _examples(config: PredictConfig, predictor: Predictor) -> list[Example]:
    task = predictor.task.name
    if config.files:
        named = {"columns": config.columns or None, "format": config.format, "errors": config.errors}
        return read_examples(config.files, task, labelled=config.labelled, **named)
    if config.text:
        given = config.text[0] if len(config.text) == 1 else tuple(config.text)
        return [predictor.example("text", given)]
    if sys.stdin.isatty():
        print("reading texts from the terminal, one a line; Ctrl-D ends", file=sys.stderr)
    found = []
    for number, line in enumerate(_stdin(config.errors).split("\n"), start=1):
        parts = line.rstrip("\r").split("\t")
        if line.strip():
            given = tuple(parts) if len(parts) == 2 and all(part.strip() for part in parts) else line.strip()
            found.append(predictor.example(f"stdin:{number}", given))
    return found


def _stdin(errors: str) -> str:
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:
        return sys.stdin.read()
    data = binary.read()
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"stdin:{line}: invalid UTF-8 at byte {error.start}; errors='replace' reads on") from None


def _line(example: Example, prediction: dict) -> str:
    known = {"id": example.id} if example.id is not None else {}
    text = {"text": example.text} if isinstance(example.text, str) and "tokens" not in prediction else {}
    return json.dumps({**known, **text, **prediction}, ensure_ascii=False) + "\n"
