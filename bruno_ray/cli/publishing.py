"""`publish`: to the hub."""

import argparse

from bruno_ray.cli.command import Command
from bruno_ray.files import expanded
from bruno_ray.runs.lookup import find_trial


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="RUN[:TRIAL]|FOLDER",
        help="a run (its selected trial, or the one that is named; saved first if need be), a saved model, or what"
        " `bruno-ray export` wrote",
    )
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository; made if it does not exist")
    parser.add_argument("--public", action="store_true", help="make it public [a new repository is private]")
    parser.add_argument("--dry-run", action="store_true", help="show what would go where, and change nothing")
    parser.epilog = (
        "The login is that of `hf auth login` or HF_TOKEN. Login, name and owner are checked first. A publication that"
        " broke off goes on when it is asked for again: what the hub has is not uploaded twice."
    )


def _publish(arguments: argparse.Namespace) -> None:
    folder = expanded(arguments.what)
    is_folder = folder.is_dir() and not (folder / "run.json").is_file()
    run, trial = (None, None) if is_folder else find_trial(arguments.what)
    from rich.table import Table

    from bruno_ray.files import size_text
    from bruno_ray.publishing import hub
    from bruno_ray.terminal import console

    if run is None:
        hub.require_publishable(folder)
        plan = hub.plan(folder, hub.check(arguments.repo, private=not arguments.public))
    else:
        from bruno_ray.pipeline import publishing

        found = publishing.publish_run(run, trial, arguments.repo, arguments.public, arguments.dry_run)
        if found is None:
            print(f"the trial is not saved yet: it would be saved, then sent to {arguments.repo}")
            return
        plan = found
    table = Table("file", "size", "")
    for file in plan.files:
        table.add_row(file.path, size_text(file.size), "" if file.state == "new" else file.state)
    console().print(table)
    console().print(plan.line(), highlight=False, markup=False)
    if plan.others:
        console().print(f"stays there: {', '.join(plan.others)}", highlight=False, markup=False)
    if arguments.dry_run:
        print("nothing was sent")
        return
    print(hub.send(plan))


COMMANDS = {"publish": Command("send a saved trial, or an export of one, to the hub", _publish, _arguments)}
