"""What the unedited model says while scorers are prepared is made once: also by a preparation that was killed."""

from pathlib import Path

import pytest

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.errors import OutputError
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.kept import KeptAnswers
from bruno_ray.prompts.sets import Prompt
from bruno_ray.residuals.extraction import extract_residuals
from bruno_ray.settings import ModelSettings, ScoringSettings
from bruno_ray.workers.exchanged import EvaluationContext
from bruno_ray.workers.model_worker import ModelWorker
from tests.scoring.helpers import DATE
from tests.support import tiny_models

TARGET = tuple(Prompt(f"what is number {i} of the list?") for i in range(16))
BASELINE = tuple(Prompt(f"say {i}") for i in range(12))
SCORERS = ("behaviour_rate", "kl_divergence", "coherence", "to_the_point", "elicited_answers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path))
    return tmp_path / "answers"


def worker_of(folder: Path) -> ModelWorker:
    return ModelWorker(ModelSettings(id=str(folder), dtypes=("float32",)), keeps_answers=True)


def context_of(worker: ModelWorker) -> EvaluationContext:
    """Half of the answers are marked; a batch is some prompts only."""
    from bruno_ray.prompts.rendering import render

    ids = render(worker.engine.tokenizer, TARGET, date=DATE)
    texts = [answer.text.strip() for answer in worker.engine.generate(ids, [None], 12)[0]]
    scoring = ScoringSettings(
        scorers=SCORERS,
        markers=tuple({text[:1] for text in texts[::2] if text}),
        response_tokens=12,
        row_tokens=300,
    )
    points = extract_residuals(worker.loaded, ids)[:, 0]
    bank = {"some": (points[:1] / points[:1].norm(dim=-1, keepdim=True)).movedim(0, 1).numpy()}
    return EvaluationContext("validation", bank, TARGET, BASELINE, "", scoring, DATE)


class Counted:
    """Rows that an engine has answered batch by batch; it is killed in the batch of number ``last``."""

    def __init__(self, worker: ModelWorker, monkeypatch: pytest.MonkeyPatch, last: int = 10**6):
        self.rows: list[int] = []
        answers = worker.engine._answers

        def counted(prompts: list, *rest: object) -> object:
            if len(self.rows) >= last:
                raise KeyboardInterrupt
            self.rows.append(len(prompts))
            return answers(prompts, *rest)

        monkeypatch.setattr(worker.engine, "_answers", counted)


def test_a_killed_preparation_goes_on_and_finds_what_it_would_have_found(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worker_of(folder)
    context = context_of(whole)
    all_rows = Counted(whole, monkeypatch)
    expected = whole.baseline(context)
    (file,) = cache.iterdir()
    edit = Edit({"mlp": AblationParameters(1.0, 1.0, 1.0, 5.0)}, "some", None, "none")
    (measured,) = whole.evaluate(context, [edit])
    assert len(all_rows.rows) > 8 and expected.counts["behaviour_rate"][0] > 0

    file.unlink()
    killed = worker_of(folder)
    before = Counted(killed, monkeypatch, last=6)
    with pytest.raises(KeyboardInterrupt):
        killed.baseline(context)
    with file.open("ab") as half:
        half.write(b'["0123", [4, 5')

    resumed = worker_of(folder)
    after = Counted(resumed, monkeypatch)
    assert resumed.baseline(context) == expected
    unedited = sum(all_rows.rows) - len(TARGET)  # the edit's answers are in there
    assert sum(before.rows) + sum(after.rows) == unedited, "nothing twice"
    (again,) = resumed.evaluate(context, [edit])
    assert measured.scores is not None and again.scores is not None
    assert again.scores.values == pytest.approx(measured.scores.values, abs=1e-6), "the same references"

    second = worker_of(folder)
    nothing = Counted(second, monkeypatch)
    assert second.baseline(context) == expected
    assert nothing.rows == [], "a second run answers nothing again"


def test_only_answers_of_the_same_model_prompt_length_and_rule_are_taken(tmp_path: Path) -> None:
    answer = Response((7, 8), "text", True, False, True, 258)
    KeptAnswers(tmp_path, model="a", markers=["x"]).add([[1, 2]], 30, True, [answer])
    kept = KeptAnswers(tmp_path, model="a", markers=["x"])
    assert kept.find([1, 2], 30, True) == Response((7, 8), "", True, False, True, 258)
    assert kept.find([1, 3], 30, True) is kept.find([1, 2], 31, True) is kept.find([1, 2], 30, False) is None
    assert KeptAnswers(tmp_path, model="b", markers=["x"]).find([1, 2], 30, True) is None
    assert KeptAnswers(tmp_path, model="a", markers=["y"]).find([1, 2], 30, True) is None


def test_edited_answers_are_never_kept(folder: Path, tmp_path: Path) -> None:
    worker = ModelWorker(ModelSettings(id=str(folder), dtypes=("float32",)))
    engine: BatchEngine = worker.engine
    ids = [[257, 65], [257, 66]]
    (resolved,) = engine.editor.resolve_all(
        [Edit({"mlp": AblationParameters(1.0, 1.0, 1.0, 5.0)}, "some", None, "none")],
        {"some": extract_residuals(worker.loaded, ids)[:1, 0].movedim(0, 1)},
    )
    with engine.keeping(KeptAnswers(tmp_path, model="a")):
        engine.generate(ids, [resolved], 3)
        engine.generate(ids, [None, resolved], 3)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(OutputError, match="cannot write /proc/none"):
        KeptAnswers(Path("/proc/none"), model="a")
