"""`bruno-ray compare`: models, trials, saved folders and servers on the same prompts."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bruno_ray.cli import main
from bruno_ray.errors import OutputError, SettingsError
from bruno_ray.intervals import mcnemar
from bruno_ray.pipeline import commands
from bruno_ray.pipeline.side_by_side import Loadable, Served, compare, parse_reference
from bruno_ray.publishing.side_by_side import SideBySide
from bruno_ray.runs.directory import RunDirectory
from tests.support import saved_run, tiny_models
from tests.support.inline_pool import InlinePool, use_inline_pools
from tests.support.judge_server import Judge

MARKERS = ("l", "p")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a run of it whose trial 1 is selected and saved."""
    folder = tmp_path_factory.mktemp("home")
    model = tiny_models.write(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        use_inline_pools(patch)
        run = saved_run.make(saved_run.settings_for(model, folder, MARKERS))
        commands.save(run.path, trial=1)
    return folder


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[InlinePool]:
    return use_inline_pools(monkeypatch)


@pytest.fixture
def server() -> Judge:
    """Answers with a marker to every other prompt, and with what a page must not take for its own."""

    def reply(text: str) -> tuple[int, dict]:
        odd = int(re.findall(r"\d+", text)[0]) % 2
        content = "lip" if odd else "<img src=x onerror=run()> & no"
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "length" if odd else "stop"}
        return 200, {"choices": [choice]}

    server = Judge()
    server.reply = reply
    yield server
    server.close()


def of(result: SideBySide) -> dict[str, dict[str, float]]:
    return {one.name: one.scores.values for one in result.contestants}


def test_a_trial_its_saved_model_and_its_base(home: Path, pools: list[InlinePool], tmp_path: Path) -> None:
    run = RunDirectory.open(home / "runs" / "mine")
    asked = [str(home / "base"), str(run.path), str(run.model_folder), f"{run.path}:0"]
    result = compare(asked, None, {}, tmp_path / "page.html")
    base, trial, saved, other = result.contestants
    assert result.reference == base.name == "base" and other.name == "mine:0"
    assert trial.scores.values["kl_divergence"] == pytest.approx(run.read().selected.test.values["kl_divergence"])
    assert saved.scores.values["kl_divergence"] == pytest.approx(trial.scores.values["kl_divergence"], rel=1e-3)
    assert base.scores.values["kl_divergence"] == 0.0
    assert other.scores.values["kl_divergence"] != trial.scores.values["kl_divergence"]
    for metric in ("behaviour_rate", "evasion_rate", "baseline_behaviour_rate"):
        recorded = run.read()
        assert trial.scores.counts[metric] == saved.scores.counts[metric] == recorded.selected.test.counts[metric]
        assert base.scores.counts[metric] == recorded.baseline["test"].counts[metric]
    assert trial.target == saved.target and trial.target != base.target
    assert len(pools) == 1  # one worker: trials share the base, the saved model replaces it


def test_a_trial_may_be_what_the_others_are_compared_with(home: Path, pools: list[InlinePool], tmp_path: Path) -> None:
    """The same by two ways: the edit live, and its weights from disk."""
    run, base = home / "runs" / "mine", str(home / "base")
    live = of(compare([f"{run}:1", base], None, {}, tmp_path / "page.html"))
    settings = RunDirectory.open(run).read().settings
    baked = of(compare([str(run / "model"), base], settings, {}, tmp_path / "page.html"))
    assert live["base"]["kl_divergence"] > 0.001 and live["mine:1"]["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert live["base"]["kl_divergence"] == pytest.approx(baked["base"]["kl_divergence"], rel=1e-3)
    forwards = of(compare([base, f"{run}:1"], None, {}, tmp_path / "page.html"))
    assert forwards["mine:1"]["kl_divergence"] != pytest.approx(live["base"]["kl_divergence"], rel=1e-3)


def test_another_tokenizer_has_rates_and_no_divergence(home: Path, pools: list[InlinePool], tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "other", "qwen2", seed=1)
    tiny_models.build_tokenizer(tiny_models.CHAT_TEMPLATE.replace("<|", "[|")).save_pretrained(folder)
    found = of(compare([str(home / "runs" / "mine"), str(folder)], None, {}, tmp_path / "page.html"))["other"]
    assert "kl_divergence" not in found and {"behaviour_rate", "evasion_rate"} <= found.keys()
    page = (tmp_path / "page.html").read_text()
    assert "it is missing if a model has another tokenizer" in page


class Reader(HTMLParser):
    """What a browser would load or run, and the text that it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.scripts += tag == "script"
        self.loads += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith(("#", "data:"))
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_server_beside_a_model_and_the_page(
    home: Path,
    pools: list[InlinePool],
    server: Judge,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_KEY", "geheim")
    to, run = tmp_path / "page.html", home / "runs" / "mine"
    served = f"other@{server.url}"
    argv = ["compare", str(run), served, "--to", str(to), "--key-variable", "SOME_KEY", "--quiet"]
    assert main.main(argv) == 0
    assert {asked["model"] for asked in server.asked} == {"other"} and len(server.asked) == 8
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer geheim"}
    prompts = [asked["messages"][-1]["content"] for asked in server.asked]
    odd = sum(int(re.findall(r"\d+", text)[0]) % 2 for text in prompts if "stone" in text)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{odd}/4" in printed and "they cannot be told apart" in printed and printed.endswith(str(to))
    mine = RunDirectory.open(run).read().selected.test.rows["behaviour_rate"]
    targets = RunDirectory.open(run).load_test_prompts()
    theirs = [int(re.findall(r"\d+", p.prompt)[0]) % 2 for p in targets if p.side == "target"]
    only_theirs, only_mine, p = mcnemar(theirs, mine)
    assert f"{only_theirs} only here, {only_mine} only there; p = {p:.2g}" in printed
    page = to.read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.loads == [] and reader.scripts == 0 and "geheim" not in page
    assert "<img src=x onerror=run()> & no" in reader.text  # shown, not run


def test_servers_alone_need_no_model(
    home: Path, pools: list[InlinePool], server: Judge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = saved_run.write_prompts(tmp_path)
    sets = [part for side, file in files.items() for part in (f"--prompts.{side}.train.source", str(file))]
    names = [f"one@{server.url}", f"two@{server.url}"]
    flags = ["--behaviour", "mine", *sets, "--scoring.markers", "lip", "--to", str(tmp_path / "page.html"), "--quiet"]
    assert main.main(["compare", *names, *flags]) == 0
    printed = capsys.readouterr().out
    assert pools == [] and "KL divergence" not in printed and printed.count("cannot be told apart") == 2
    assert "p = 1" in printed and "Only answers were available" in (tmp_path / "page.html").read_text()


def test_what_is_meant_by_a_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert parse_reference("gpt@https://x.example/v1") == Served("gpt", "https://x.example/v1")
    by_name, by_path = parse_reference("mine:1"), parse_reference("runs/mine")
    assert by_name.run.path == by_path.run.path and (by_name.trial, by_path.trial) == (1, None)
    assert parse_reference("base") == Loadable(model="base")
    assert parse_reference("owner/name") == Loadable(model="owner/name")
    assert parse_reference("smollm2") == Loadable(model="smollm2")
    with pytest.raises(OutputError, match=r"nothing:3 is no run here, no model and no server"):
        parse_reference("nothing:3")
    for mistaken in ("mine:last", "./runs/mine:last"):
        with pytest.raises(OutputError, match="mine:last"):
            parse_reference(mistaken)
    with pytest.raises(SettingsError, match="names no model; write MODEL@http"):
        parse_reference("@http://localhost/v1")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["runs/mine"], "nothing to compare one model with"),
        (["runs/mine", "base", "--behaviour", "verbosity"], "a run has its own prompts"),
        (["runs/mine", "x@http://127.0.0.1:9/v1"], "cannot be reached"),
        (["runs/mine:77", "base"], "no trial 77"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    monkeypatch.chdir(home)
    assert main.main(["compare", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (home / "compare.html").exists()
