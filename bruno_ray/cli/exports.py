"""`export` and `apply`: edits in other forms than whole models."""

import argparse
from pathlib import Path

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.cli.setting_flags import load_settings, takes_settings
from bruno_ray.exporting.registry import EXPORTERS
from bruno_ray.runs.lookup import find_trial
from bruno_ray.settings.keys import FLAGS

MODEL_FLAGS = {flag: key for flag, key in FLAGS.items() if key.startswith("model.")}
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN[:TRIAL]", help="run directory, or its name below the output directory")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORM",
        help=f"{', '.join(EXPORTERS)}: an adapter for PEFT, a file for llama.cpp, an edit for vLLM with our plug-in, a"
        " file for `bruno-ray apply`; or an exporter of an installed package, or FILE.py:NAME",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write it to; must not exist")
    parser.add_argument(
        "--max-error",
        type=values.share,
        default=0.05,
        metavar="X",
        help="lora: largest share of a weight's change that may be left out, for edits with norm_mode full [0.05]",
    )
    parser.add_argument(
        "--max-rank", type=values.count, default=64, metavar="N", help="lora: largest rank for such edits [64]"
    )
    parser.add_argument("--outtype", default="auto", choices=OUTTYPES, help="gguf: type of the weights [auto]")

    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=values.pair,
        metavar="NAME=VALUE",
        help="for an exporter from outside; may be given several times",
    )


def _export(arguments: argparse.Namespace) -> None:
    run, trial = find_trial(arguments.run)
    from bruno_ray.pipeline import exports

    folder = exports.export(
        run.path,
        trial,
        arguments.to,
        arguments.folder,
        max_error=arguments.max_error,
        max_rank=arguments.max_rank,
        outtype=arguments.outtype,
        given=dict(arguments.option),
    )
    print(folder)


def _apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="what `export --to directions` wrote, or its folder")
    takes_settings(parser)
    parser.usage = "%(prog)s FILE [MODEL] --to FOLDER [OPTIONS] [--model.SETTING VALUE ...]"
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder for the model; must not exist")


def _apply(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments)
    from bruno_ray.pipeline import exports

    print(exports.apply(arguments.file, loaded.settings, arguments.to))


COMMANDS = {
    "export": Command(
        "write a trial as an adapter, a GGUF file, an edit for vLLM or a file of directions", _export, _export_arguments
    ),
    "apply": Command(
        "bake an exported edit into another copy of its base model", _apply, _apply_arguments, MODEL_FLAGS
    ),
}
