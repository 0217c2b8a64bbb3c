"""Runs heretic-llm 1.4.0 without a terminal. Executed by ``tool_runs.py`` inside heretic's own environment.

heretic asks what to do when its study is finished. The answers are given here: the trial with the fewest
refusals whose KL divergence is within the bound (bruno-ray's own rule), saved merged to a folder, and if wanted the
trials next to it on heretic's front, each to MODEL_OUT with its number. Nothing of heretic's search, scoring or editing
is touched.

    python heretic_driver.py CONFIG_FOLDER OUTPUT_JSON MODEL_OUT MAX_KL [NEIGHBOURS]

CONFIG_FOLDER holds heretic's ``config.toml``.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    config, output, model_out, max_kl = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    n_neighbours = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    output, model_out = output.resolve(), model_out.resolve()
    os.chdir(config)
    sys.argv = sys.argv[:1]  # heretic parses the command line itself

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_num_interop_threads(1)
    from heretic import main as heretic_main

    record: dict = {"neighbours": {}}
    todo: list | None = None  # trials to save, once heretic has shown its front
    saving = None

    def select(message: str, choices: list) -> object:
        nonlocal todo, saving
        values = [getattr(choice, "value", choice) for choice in choices]
        trials = [value for value in values if hasattr(value, "user_attrs")]
        if trials:
            if todo is None:
                todo = wanted(trials, max_kl, n_neighbours)
                record["selected"] = todo[0].number
            saving = todo.pop(0) if todo else None
            return saving or ""  # nothing: leave the menu, and heretic
        if saving is None:
            record.setdefault("saved_at", time.time())
            return ""  # back to the trials
        for value in values:
            if "local folder" in str(value).lower():
                return value
        raise RuntimeError(f"heretic asks something unexpected: {message!r} {values!r}")

    def path(message: str) -> str:
        nonlocal saving
        number, saving = saving.number, None
        if number == record["selected"]:
            return str(model_out)
        record["neighbours"][number] = f"{model_out}-{number}"
        return record["neighbours"][number]

    heretic_main.prompt_select = select
    heretic_main.prompt_path = path
    heretic_main.run()
    if not (model_out / "config.json").exists():
        raise RuntimeError(f"heretic has saved nothing in {model_out}")

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    (journal,) = Path("checkpoints").glob("*.jsonl")
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.load_study(study_name=None, storage=storage)
    record["trials"] = [
        {
            "number": trial.number,
            "refusals": trial.user_attrs["refusals"],
            "kl_divergence": trial.user_attrs["kl_divergence"],
            "started": trial.datetime_start.timestamp(),
            "finished": trial.datetime_complete.timestamp(),
        }
        for trial in study.trials
        if trial.state == optuna.trial.TrialState.COMPLETE
    ]
    output.write_text(json.dumps(record))


def wanted(front: list, max_kl: float, n_neighbours: int) -> list:
    """The trial that the rule takes, and those nearest to it in the order of refusals, fewer first."""
    by_refusals = sorted(front, key=lambda t: (t.user_attrs["refusals"], t.user_attrs["kl_divergence"]))
    within = [trial for trial in by_refusals if trial.user_attrs["kl_divergence"] <= max_kl]
    best = (within or by_refusals)[0]
    place = by_refusals.index(best)
    nearest = sorted(range(len(by_refusals)), key=lambda i: abs(i - place))
    return [by_refusals[i] for i in nearest[: 1 + n_neighbours]]


if __name__ == "__main__":
    main()
