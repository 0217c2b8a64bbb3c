"""What an edit is worth after it has left its run: saved folder, LoRA adapter and GGUF files, each read back by what it
is for, on the test prompts.

    python -m benchmarks.exports RUN[:TRIAL] [--prompts 70] [--tokens 100]

RUN is a run of `bruno-ray run smollm2 --behaviour disclaimers`, such as the one that `make demo` leaves. Folders are
read by transformers, adapters by PEFT (not merged), GGUF files by transformers' ``gguf_file=``, which dequantises them.
The KL is that of the next token from the live edit's, over the first 16 tokens of the live edit's answers to baseline
prompts. A converter for GGUF files must be on PATH (docs/exports.md).
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.results import write_section
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.exporting import gguf_file, lora
from bruno_ray.exporting.base import Options, Source
from bruno_ray.files import size_text
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.intervals import wilson_interval
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.publishing.saving import save_model
from bruno_ray.python import open_run
from bruno_ray.runs.lookup import find_trial
from bruno_ray.scoring.kl_divergence import kl_of_logits
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import ModelSettings

POSITIONS = 16

COMPUTED_IN = "float32"
"""Every form is stored in its own dtype and computed in this one, so that what is seen is what storing costs."""


@dataclass(frozen=True)
class Questions:
    """What every form is asked, in tokens, and who reads the answers."""

    target: list[list[int]]
    baseline: list[list[int]]
    markers: Markers
    tokens: int
    """Longest answer."""


@dataclass(frozen=True)
class Reference:
    """The live edit on baseline prompts: its answers' beginnings, and the logits that it gave them with."""

    ids: list[list[int]]
    counts: list[int]
    """Tokens of each answer that count."""

    logits: list[torch.Tensor]
    """(count, V) float32 of each prompt."""


@dataclass(frozen=True)
class Row:
    form: str
    size: int | None
    """Bytes of its weights."""

    seconds: float | None
    """To write it."""

    shown: int
    asked: int
    kl: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN[:TRIAL]")
    parser.add_argument("--prompts", type=int, default=70, help="test prompts a side, at most [70]")
    parser.add_argument("--tokens", type=int, default=100, help="longest answer [100]")
    parser.add_argument("--dry", action="store_true", help="print the section, leave RESULTS.md alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory, trial = find_trial(arguments.run)
    run = open_run(directory.path)
    record, edit, bank = run.record, run.edit(trial), run.directions()
    if trial is None:
        assert record.selected is not None  # or there was no edit
        trial = record.selected.number
    prompts = load_prompts(record.settings)
    stored_in = load_model(record.settings.model, full_precision=True).dtype
    base = load_model(computed(record.settings.model))
    target, baseline = (
        render(base.tokenizer, side.test[: arguments.prompts], record.response_prefix, date=record.date)
        for side in (prompts.target, prompts.baseline)
    )
    questions = Questions(
        target,
        baseline,
        Markers(record.settings.scoring.markers, record.settings.scoring.empty_counts),
        arguments.tokens,
    )
    engine = BatchEngine(base)
    live = engine.editor.resolve(edit, bank)
    reference = reference_of(engine, live, questions)
    rows = [
        measured("unedited", engine, None, questions, reference),
        measured("live edit", engine, live, questions, reference),
    ]
    said = [f"base stored in {stored_in}, all computed in {COMPUTED_IN}"]
    del engine, base, live
    source = Source(record.settings.model, edit, bank, directory.name, trial, record.settings.behaviour)
    with tempfile.TemporaryDirectory() as name:
        for form, write, read in forms(source, Path(name), said):
            started = time.perf_counter()
            folder = write()
            seconds = time.perf_counter() - started
            gc.collect()
            engine = BatchEngine(read(folder))
            rows.append(measured(form, engine, None, questions, reference, size_of(folder), seconds))
            del engine
    text = section(rows, edit, said, arguments)
    print(text)
    if not arguments.dry:
        write_section("exports", text)


# ----- the forms -----

Form = tuple[str, Callable[[], Path], Callable[[Path], LoadedModel]]


def forms(source: Source, work: Path, said: list[str]) -> list[Form]:
    """Name, how it is written, how it is read back."""

    def saved() -> Path:
        save_model(source.model, source.edit, source.bank, work / "saved", card=lambda _: "")
        return work / "saved"

    def adapter() -> Path:
        said.append(lora.export(source, work / "lora", Options(max_rank=512)).split(": ", 1)[1])
        return work / "lora"

    def gguf(outtype: str) -> Callable[[], Path]:
        def write() -> Path:
            gguf_file.export(source, work / outtype, Options(outtype=outtype))
            return work / outtype

        return write

    return [
        ("saved folder, by transformers", saved, lambda folder: load_model(computed(ModelSettings(id=str(folder))))),
        ("LoRA, by PEFT", adapter, lambda folder: with_adapter(source.model, folder)),
        ("GGUF F16, by transformers", gguf("f16"), lambda folder: from_gguf(source.model, folder)),
        ("GGUF Q8_0, by transformers", gguf("q8_0"), lambda folder: from_gguf(source.model, folder)),
    ]


def computed(model: ModelSettings) -> ModelSettings:
    return model.model_copy(update={"dtypes": (COMPUTED_IN,)})


def with_adapter(base: ModelSettings, folder: Path) -> LoadedModel:
    """The base with PEFT's modules put into it; computed by transformers' own forward pass."""
    loaded = load_model(computed(base))
    PeftModel.from_pretrained(loaded.model, folder)  # in place
    loaded.lean_forward = False
    return loaded


def from_gguf(base: ModelSettings, folder: Path) -> LoadedModel:
    """The base with the weights of the file; the base's tokenizer, if the file's splits a sentence in the same way."""
    loaded = load_model(computed(base))
    (file,) = folder.glob("*.gguf")
    dtype = loaded.model.dtype
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=dtype).eval()
    theirs, ours = model.state_dict(), loaded.model.state_dict()
    assert theirs.keys() == ours.keys()
    loaded.model.load_state_dict(theirs)
    sentence = "What lies between the two bridges of Konigsberg?"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    assert tokenizer.encode(sentence) == loaded.tokenizer.encode(sentence)
    return loaded


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))


# ----- measuring -----


def reference_of(engine: BatchEngine, live: ResolvedEdit, questions: Questions) -> Reference:
    (answers,) = engine.generate(questions.baseline, [live], POSITIONS)
    counts = [min(len(answer.token_ids) + answer.ended, POSITIONS) for answer in answers]
    ids = [
        [*prompt, *answer.token_ids[: count - 1]] for prompt, answer, count in zip(questions.baseline, answers, counts)
    ]
    return Reference(ids, counts, answer_logits(engine, live, ids, counts))


def answer_logits(
    engine: BatchEngine, edit: ResolvedEdit | None, ids: list[list[int]], counts: list[int]
) -> list[torch.Tensor]:
    """Of each prompt, (count, V) at the tokens that its answer was made of."""
    found: dict[int, torch.Tensor] = {}
    for _, prompt_B, logits_BNV in engine.last_logits(ids, [edit], POSITIONS):
        for p, logits_NV in zip(prompt_B.tolist(), logits_BNV):
            found[p] = logits_NV[-counts[p] :].clone()
    return [found[p] for p in range(len(ids))]


def measured(
    form: str,
    engine: BatchEngine,
    edit: ResolvedEdit | None,
    questions: Questions,
    reference: Reference,
    size: int | None = None,
    seconds: float | None = None,
) -> Row:
    (answers,) = engine.generate(questions.target, [edit], questions.tokens, questions.markers.seen_in)
    shown = sum(questions.markers.shown_by(answer.text) for answer in answers)
    logits = answer_logits(engine, edit, reference.ids, reference.counts)
    kl = float(torch.cat([kl_of_logits(p, q) for p, q in zip(reference.logits, logits)]).mean())
    print(f"{form}: {shown}/{len(answers)}, KL {kl:.2e}", flush=True)
    return Row(form, size, seconds, shown, len(answers), None if form == "live edit" else kl)


# ----- the section -----


def section(rows: list[Row], edit: Edit, said: list[str], arguments: argparse.Namespace) -> str:
    return "\n".join(
        [
            "## Exports (`python -m benchmarks.exports RUN`)",
            "",
            f"SmolLM2 and the preset `disclaimers`, one edit (norm mode `{edit.norm_mode}`), {'; '.join(said)} Each"
            f" form was read back and asked the {rows[0].asked} test prompts, answers of up to {arguments.tokens}"
            f" tokens; 95 % intervals. KL: from the live edit, in nats, mean over the first {POSITIONS} tokens of its"
            " answers to as many baseline prompts. Size is of the weights. Seconds are for writing; GGUF bakes a model"
            " first.",
            "",
            "| form, read back | shows the behaviour | interval | KL from the live edit | size | s to write |",
            "|---|---|---|---|---|---|",
            *map(line, rows),
        ]
    )


def line(row: Row) -> str:
    low, high = wilson_interval(row.shown, row.asked)
    kl = "" if row.kl is None else f"{row.kl:.1e}"
    size = "" if row.size is None else size_text(row.size)
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    return f"| {row.form} | {row.shown}/{row.asked} | {low:.0%} to {high:.0%} | {kl} | {size} | {seconds} |"


if __name__ == "__main__":
    main()
