"""Runs heretic-llm 1.4.0 without a terminal. Executed by ``vs_heretic.py`` inside heretic's own environment.

heretic asks what to do when its study is finished. The answers are given here: the trial with the fewest
refusals whose KL divergence is within the bound (bruno-ray's own rule), saved merged to a folder. Nothing of
heretic's search, scoring or editing is touched.

    python heretic_driver.py CONFIG_FOLDER OUTPUT_JSON MODEL_OUT MAX_KL

CONFIG_FOLDER holds heretic's ``config.toml``.
"""

import contextlib
import json
import os
import sys
from pathlib import Path


class Finished(Exception):
    """The model is saved: leave heretic's menu."""


def main() -> None:
    config, output, model_out, max_kl = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    output, model_out = output.resolve(), model_out.resolve()
    os.chdir(config)
    sys.argv = sys.argv[:1]  # heretic parses the command line itself

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_num_interop_threads(1)
    from heretic import main as heretic_main

    saved = False

    def select(message: str, choices: list) -> object:
        nonlocal saved
        if saved:
            raise Finished
        values = [getattr(choice, "value", choice) for choice in choices]
        trials = [value for value in values if hasattr(value, "user_attrs")]
        if trials:
            within = [trial for trial in trials if trial.user_attrs["kl_divergence"] <= max_kl]
            best = min(within or trials, key=lambda t: (t.user_attrs["refusals"], t.user_attrs["kl_divergence"]))
            record["selected"] = best.number
            return best
        for value in values:
            if "local folder" in str(value).lower():
                saved = True
                return value
        raise RuntimeError(f"heretic asks something unexpected: {message!r} {values!r}")

    record: dict = {}
    heretic_main.prompt_select = select
    heretic_main.prompt_path = lambda message: str(model_out)
    with contextlib.suppress(Finished):
        heretic_main.run()

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    (journal,) = Path("checkpoints").glob("*.jsonl")
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.load_study(study_name=None, storage=storage)
    record["trials"] = [
        {
            "refusals": trial.user_attrs["refusals"],
            "kl_divergence": trial.user_attrs["kl_divergence"],
            "started": trial.datetime_start.timestamp(),
            "finished": trial.datetime_complete.timestamp(),
        }
        for trial in study.trials
        if trial.state == optuna.trial.TrialState.COMPLETE
    ]
    output.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
