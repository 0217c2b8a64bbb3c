"""The report: one file that needs nothing else, with run.json's own figures in it, whatever the study looks like."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs

from bruno_ray.errors import OutputError
from bruno_ray.publishing import plots
from bruno_ray.publishing.report import render_report, write_report
from bruno_ray.runs.records import CostRecord, ReadAnswer, Readings
from tests.support import finished_run

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a browser would load, which elements are left open, and the text of table cells and tiles."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.feed(html.replace(get_plotlyjs(), ""))  # its megabytes would take most of the time
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id", ""))
        self.scripts += tag == "script"
        self.loads += [given[key] for key in ("src", "srcset", "data", "poster") if given.get(key)]
        if tag == "link":
            self.loads.append(given["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open and data.strip():
            self.text.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run.make(tmp_path_factory.mktemp("report") / "tiny")


@pytest.fixture(scope="module")
def page(finished) -> Page:
    return Page(render_report(finished.run, finished.study))


def test_what_a_cluster_has_cost_is_said_where_an_account_was_kept(finished, page):
    def said() -> str:
        return " ".join(Page(render_report(finished.run, finished.study)).text)

    assert "cost of" not in " ".join(page.text)
    trials, number = finished.run.read().n_trials["COMPLETE"], finished.run.read().selected.number
    try:
        finished.run.save_cost(CostRecord(dollars=4.0, until=0.0, ended=True))
        assert f"The cost of its result (trial {number}): 4.00 $, {4 / trials:.4f} $ for each" in said()
        finished.run.cost_file.write_text("{}")
        with pytest.raises(OutputError, match=r"cost\.json is damaged"):
            said()
    finally:
        finished.run.cost_file.unlink()


def test_report_is_well_formed_and_loads_nothing(finished, page):
    html = write_report(finished.run, finished.study).read_text()
    assert html.startswith("<!DOCTYPE html>") and page.open == []
    assert page.loads == ["data:,"]
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "@import" not in styles and "url(" not in styles
    assert html.count(get_plotlyjs()) == 1


def test_figures_are_those_of_run_json(finished, page):
    record = finished.run.read()
    events, total = record.selected.saved.counts["behaviour_rate"]
    low, high = record.selected.saved.intervals["behaviour_rate"]
    assert f"{events}/{total}" in page.text
    assert f"{events}/{total} = {100 * events / total:.1f} %" in page.text
    assert f"{100 * low:.1f} to {100 * high:.1f} %" in page.text
    assert "0.02345" in page.text  # the KL divergence of the saved model, not that of the search
    search_kl = record.selected.validation.values["kl_divergence"]
    assert f"{search_kl:.4g}" in page.text and f"{search_kl:.4g}" != "0.02345"
    assert "restricted 45/48, benign 100/100" in page.text
    assert "181.0" in page.text and any("203 s in all" in text for text in page.text)  # the stages, and their sum


def test_selected_trial_is_marked_on_the_front(finished, page):
    assert "selected" in page.text
    front = plots.pareto_front(plots.selection.load_trials(finished.study), ("behaviour_rate", "kl_divergence"), 999)
    assert [trace.name for trace in front.data] == ["dominated", "Pareto front"]
    assert front.layout.xaxis.title.text == "behaviour rate" and front.layout.yaxis.title.text == "KL divergence"
    best = {(t.values[0], t.values[1]) for t in finished.study.best_trials}
    assert set(zip(front.data[1].x, front.data[1].y)) == best


def test_text_of_models_and_prompts_is_escaped(finished, page):
    html = render_report(finished.run, finished.study)
    assert "<b>the rain</b>" not in html and "Where does <b>the rain</b> go?" in page.text


def test_no_path_of_this_machine_is_in_it(finished):
    assert str(finished.run.path) not in render_report(finished.run, finished.study)


def read_answer(i: int, **shows: float | None) -> ReadAnswer:
    return ReadAnswer(prompt=f"prompt {i} <i>", answer=f"answer {i}", shows=shows)


def test_where_the_readers_disagree_is_shown_before_and_after(tmp_path):
    finished = finished_run.make(tmp_path / "run", n_trials=3)
    number = finished.record.selected.number
    before = [read_answer(i, markers=float(i < 9), detector=0.01) for i in range(20)]
    after = [read_answer(i, markers=0.0, detector=0.9 if i == 4 else 0.2, judge=None if i else 1.0) for i in range(20)]
    finished.run.save_readings(Readings(trial=number, unedited=before, edited=before, saved=after))
    page = Page(render_report(finished.run, finished.study))
    assert page.open == [] and "readers" in page.ids
    said = "Markers and detector disagree on {} of 20 answers: {} show it by the markers only, {} by the detector only."
    assert said.format(9, 9, 0) in page.text and said.format(1, 0, 1) in page.text
    assert any(text.startswith("Markers and judge disagree on 1 of 1 answers") for text in page.text)
    assert page.text.count("markers: yes, detector: no (0.01)") == 6
    assert "markers: no, detector: yes (0.90), judge: silent" in page.text
    assert "markers: no, detector: no (0.20), judge: yes (1.00)" in page.text
    assert "prompt 4 <i>" in page.text

    finished.run.save_readings(Readings(trial=number + 1, unedited=before))
    assert "readers" not in Page(render_report(finished.run, finished.study)).ids
    finished.run.readings_file.write_text("[]")
    with pytest.raises(OutputError, match=r"readings\.json is damaged"):
        render_report(finished.run, finished.study)


FOUR = ("behaviour_rate", "kl_divergence", "incoherence", "kl_p95")


@pytest.mark.parametrize(("n_objectives", "n_trials"), [(2, 0), (1, 1), (3, 1), (1, 9), (2, 3), (3, 9), (4, 3)])
def test_any_number_of_objectives_and_trials(tmp_path, n_objectives, n_trials):
    finished = finished_run.make(tmp_path / "run", FOUR[:n_objectives], n_trials, saved=False)
    page = Page(render_report(finished.run, finished.study))
    assert page.open == []
    assert ("Importances need at least 8 completed trials." in page.text) == (n_trials < plots.FEWEST_FOR_IMPORTANCE)
    assert ("A front needs two objectives." in page.text) == (n_objectives == 1)
    assert any("No trial has been selected yet." in text for text in page.text) == (n_trials == 0)


def test_run_without_geometry_and_samples_has_a_report_too(tmp_path):
    finished = finished_run.make(tmp_path / "run", n_trials=3)
    finished.run.geometry_file.unlink()
    finished.run.samples_file.unlink()
    page = Page(render_report(finished.run, finished.study))
    assert not {"geometry", "answers"} & page.ids and {"result", "study", "edit", "provenance"} <= page.ids


def test_damaged_geometry_is_one_clear_line(tmp_path):
    finished = finished_run.make(tmp_path / "run", n_trials=1)
    finished.run.geometry_file.write_text("{")
    with pytest.raises(OutputError, match=r"geometry\.json is damaged"):
        render_report(finished.run, finished.study)


def test_deep_models_get_at_most_so_many_panels():
    assert plots.evenly_spaced(5, 24) == [0, 1, 2, 3, 4]
    points = plots.evenly_spaced(81, 24)
    assert len(points) == 24 and points[0] == 0 and points[-1] == 80


@pytest.mark.browser
def test_browser_draws_every_plot_without_a_request(finished):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium")
    path = write_report(finished.run, finished.study)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    # Every name but localhost is unknown: a request would fail, and its error would be logged.
    options = ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run([*command, *options, f"file://{path}"], capture_output=True, text=True, timeout=120)
    wanted = path.read_text().count("Plotly.newPlot(")
    drawn = len(re.findall(r'<svg class="main-svg"[^>]*>\s*<defs', done.stdout))
    assert wanted >= 9 and drawn >= wanted
    assert "ERR_NAME_NOT_RESOLVED" not in done.stderr and "CONSOLE" not in done.stderr
