"""Precedence, merging and errors of settings; every case goes through `load`, as a user's run does."""

from pathlib import Path

import pytest

from bruno_ray.errors import SettingsError
from bruno_ray.settings import Settings
from bruno_ray.settings.flags import flag_values
from bruno_ray.settings.keys import FIELDS, leaves
from bruno_ray.settings.sources import PRESETS, apply, load, preset_names

SOURCES = ("default", "preset", "file", "environment", "flag")


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_source_wins_over_those_below(empty_directory: Path) -> None:
    """The whole table: for every combination of sources that speak, the highest is heard and named as origin."""
    key, values = "study.n_trials", {"default": 200, "preset": 11, "file": 22, "environment": 33, "flag": 44}
    for spoken in range(2 ** (len(SOURCES) - 1)):
        says = {source: bool(spoken >> i & 1) for i, source in enumerate(SOURCES[1:])}
        preset = empty_directory / "mine.toml"
        preset.write_text("[study]\nn_trials = 11\n" if says["preset"] else "")
        config = empty_directory / "config.toml"
        config.write_text(f"behaviour = '{preset.name}'\n" + ("[study]\nn_trials = 22\n" if says["file"] else ""))
        environ = {"BRUNO_STUDY__N_TRIALS": "33"} if says["environment"] else {}
        loaded = load(["--study.n-trials", "44"] if says["flag"] else [], environ=environ)
        highest = max((source for source in SOURCES[1:] if says[source]), key=SOURCES.index, default="default")
        origin = {
            "default": "default",
            "preset": "preset mine.toml",
            "file": "config.toml",
            "environment": "environment BRUNO_STUDY__N_TRIALS",
            "flag": "command line",
        }[highest]
        assert (loaded.settings.study.n_trials, loaded.origins[key]) == (values[highest], origin), says


def test_one_field_of_a_nested_group_alone_from_every_source(empty_directory: Path) -> None:
    (empty_directory / "preset.toml").write_text("[search.mlp]\nmax_weight = [0.1, 0.2]\n")
    (empty_directory / "config.toml").write_text("[search.mlp]\nmin_weight = [0.3, 0.4]\n")
    loaded = load(
        ["--behaviour", "preset.toml", "--search.mlp.max-weight-position", "0.5,0.6"],
        environ={"BRUNO_SEARCH__MLP__MIN_WEIGHT_DISTANCE": "0.7,0.8", "BRUNO_SEARCH": '{"norm_mode": "pre"}'},
    )
    mlp = loaded.settings.search.mlp
    assert (mlp.max_weight, mlp.min_weight) == ((0.1, 0.2), (0.3, 0.4))
    assert (mlp.max_weight_position, mlp.min_weight_distance) == ((0.5, 0.6), (0.7, 0.8))
    assert loaded.settings.search.norm_mode == "pre"
    assert loaded.settings.search.attention == Settings().search.attention


def test_config_argument_replaces_the_one_of_the_directory(empty_directory: Path) -> None:
    (empty_directory / "config.toml").write_text("[study]\nseed = 1\n")
    (empty_directory / "other.toml").write_text("[study]\nn_trials = 5\n")
    study = load(config=Path("other.toml")).settings.study
    assert (study.seed, study.n_trials) == (0, 5)
    with pytest.raises(SettingsError, match=r"absent\.toml does not exist"):
        load(config=Path("absent.toml"))


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--trials", "7"], "study.n_trials", 7),
        (["--study.n_trials=7"], "study.n_trials", 7),
        (["--auto-select"], "selection.auto", True),
        (["--selection.auto", "false"], "selection.auto", False),
        (["--auto-select", "--seed", "3"], "study.seed", 3),
        (["--directions.projected=no"], "directions.projected", False),
        (["--search.mlp.max-weight", "-0.25,1.5"], "search.mlp.max_weight", (-0.25, 1.5)),
        (["--scoring.markers", '["a, b", "c"]'], "scoring.markers", ("a, b", "c")),
        (["--scoring.markers", "a,b", "--scoring.markers", "c"], "scoring.markers", ("a", "b", "c")),
        (["--scoring.scorers", ""], "scoring.scorers", ()),
        (["--model.max-memory", "0=20GiB,cpu=60GiB"], "model.max_memory", {"0": "20GiB", "cpu": "60GiB"}),
        (["--prompts.system-prompt", "none"], "prompts.system_prompt", None),
        (["--model.quantization", "none"], "model.quantization", "none"),
        (["--prompts.system-prompt", "--be brief"], "prompts.system_prompt", "--be brief"),
        (["--output", "there"], "output.directory", Path("there")),
    ],
)
def test_flags(argv: list[str], key: str, value: object) -> None:
    loaded = load(argv, environ={})
    node: object = loaded.settings
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value
    assert loaded.origins[key] == "command line"


def raises_one_line(*parts: str, argv: list[str] | None = None, environ: dict[str, str] | None = None) -> None:
    with pytest.raises(SettingsError) as caught:
        load(argv or [], environ=environ or {})
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_misspelt_key_in_each_source(empty_directory: Path) -> None:
    raises_one_line("--study.n-trails", "did you mean '--study.n-trials'", argv=["--study.n-trails", "5"])
    raises_one_line("--trails", "'--trials'", argv=["--trails", "5"])
    raises_one_line("BRUNO_STUDY__SED", "'BRUNO_STUDY__SEED'", environ={"BRUNO_STUDY__SED": "5"})
    raises_one_line("BRUNO_SEED", "'BRUNO_STUDY__SEED'", environ={"BRUNO_SEED": "5"})
    raises_one_line("BRUNO_XYZZY", "show-config", environ={"BRUNO_XYZZY": "5"})
    raises_one_line("BRUNO_STUDY", "'study.sed'", "'study.seed'", environ={"BRUNO_STUDY": '{"sed": 5}'})
    (empty_directory / "mine.toml").write_text("[scoring]\nmarker = ['no']\n")
    raises_one_line("preset mine.toml", "'scoring.marker'", "'scoring.markers'", argv=["--behaviour", "mine.toml"])
    (empty_directory / "config.toml").write_text("[search.mlp]\nmax_wieght = [0, 1]\n")
    raises_one_line("config.toml", "'search.mlp.max_wieght'", "'search.mlp.max_weight'")
    (empty_directory / "config.toml").write_text("n_trials = 5\n")
    raises_one_line("config.toml", "'n_trials'", "'study.n_trials'")


def test_a_misspelt_key_is_an_error_although_a_higher_source_speaks(empty_directory: Path) -> None:
    (empty_directory / "config.toml").write_text("[study]\nn_trails = 5\n")
    raises_one_line("config.toml", "n_trails", argv=["--trials", "5"])


def test_wrong_values_name_their_source(empty_directory: Path) -> None:
    raises_one_line("--trials", "'many'", "integer", argv=["--trials", "many"])
    raises_one_line("environment BRUNO_STUDY__SEED", "'-3'", environ={"BRUNO_STUDY__SEED": "-3"})
    raises_one_line("--model.dtypes", "'fp8'", "bfloat16", argv=["--model.dtypes", "auto,fp8"])
    raises_one_line("--search.mlp.max-weight", "low, high", argv=["--search.mlp.max-weight", "2,1"])
    for flag in ("--search.direction-index", "--search.attention.max-weight-position"):
        raises_one_line(flag, "fractions of the depth, 0 (first) to 1 (last)", argv=[flag, "5,40"])
        raises_one_line(flag, "fractions of the depth", argv=[flag, "-3,0.5"])
        assert load([flag, "0,1"], environ={})
    raises_one_line("min-weight-distance", "not in layers", argv=["--search.mlp.min-weight-distance", "1,40"])
    raises_one_line("min-weight-distance", "not in layers", argv=["--search.mlp.min-weight-distance", "-1,1"])
    raises_one_line("min-weight", "share of the peak", argv=["--search.mlp.min-weight", "0,1.5"])
    raises_one_line("--ray.object-store-memory", "83886080", argv=["--ray.object-store-memory", "1000000"])
    raises_one_line("--selection.max-kl", "finite", argv=["--selection.max-kl", "nan"])
    raises_one_line("--model.max-memory", "key=value", argv=["--model.max-memory", "20GiB"])
    raises_one_line("--target", "not UTF-8", argv=["--target", "\udce9.csv"])
    raises_one_line("--scoring.markers", "not UTF-8", argv=["--scoring.markers", '["abc \\ud83d"]'])
    raises_one_line("--trials", "value", argv=["--trials"])
    raises_one_line("--trials", "value", argv=["--trials", "--seed", "3"])
    raises_one_line("--study.seed and --seed differ; leave one out", argv=["--seed", "3", "--study.seed", "4"])
    raises_one_line("--seed is given twice, with different values", argv=["--seed", "3", "--seed", "4"])
    for name in ("a/../b", "..", "a\\b", "trial:3", ""):
        raises_one_line("--study-name", "that of a folder", argv=[f"--study-name={name}"])
    raises_one_line("stray", "too many", argv=["stray"])
    raises_one_line("behaviour", "refusl", "'refusal'", argv=["--behaviour", "refusl"])
    raises_one_line("prompts.target.test.source", "required", argv=["--prompts.target.test.split", "test"])
    raises_one_line("residuals.answer_tokens to 2", argv=["--directions.positions", "0,2"])
    (empty_directory / "config.toml").write_text("study = 5\n")
    raises_one_line("config.toml", "group of settings", "[study]")
    (empty_directory / "config.toml").write_text("[study]\nseed = 'x'\nn_trials = 0\n")
    raises_one_line("config.toml: study.seed", "'x'", "config.toml: study.n_trials")
    (empty_directory / "config.toml").write_text("[study\n")
    raises_one_line("config.toml", "not valid TOML", "line 1")
    (empty_directory / "config.toml").write_bytes(b"\xff\xfe")
    raises_one_line("config.toml", "not valid TOML")


def test_reserved_variables_are_no_settings() -> None:
    assert (
        load(environ={"BRUNO_CACHE": "/somewhere", "BRUNO_API_KEY": "k", "OTHER_BRUNO": "1"}).settings
        == load(environ={}).settings
    )


def test_own_prompts_replace_those_of_the_preset(empty_directory: Path) -> None:
    """Else the preset's split and column would be looked for in the user's file, or scoring use its prompts."""
    preset = load(["--behaviour", "organism"], environ={}).settings.prompts
    assert preset.target.validation is not None
    own = load(["--behaviour", "organism", "--target", "mine.jsonl"], environ={}).settings.prompts
    assert own.target.train is not None
    assert (own.target.train.source, own.target.train.column) == ("mine.jsonl", None)
    assert own.target.validation is None and own.target.test is None
    assert own.baseline == preset.baseline
    argv = ["--behaviour", "organism", "--prompts.target.test.source", "mine.jsonl"]
    only_test = load(argv, environ={}).settings.prompts.target
    assert only_test.train == preset.target.train and only_test.validation == preset.target.validation
    assert only_test.test is not None and only_test.test.split == "train"
    split = load(["--prompts.target.train.split", "train[:10]"], environ={}).settings.prompts.target.train
    assert split is not None and split.source == "mlabonne/harmful_behaviors" and split.split == "train[:10]"


def test_sources_beside_a_preset_file_are_found(empty_directory: Path) -> None:
    folder = empty_directory / "presets"
    folder.mkdir()
    (folder / "mine.jsonl").write_text('{"prompt": "x"}\n')
    (folder / "mine.toml").write_text("[prompts.target.train]\nsource = 'mine.jsonl'\n")
    train = load(["--behaviour", "presets/mine.toml"], environ={}).settings.prompts.target.train
    assert train is not None and Path(train.source) == Path("presets/mine.jsonl")


def test_overrides_on_a_stored_run() -> None:
    stored = Settings.model_validate_json(load(["--seed", "3"], environ={}).settings.model_dump_json())
    changed = apply(stored, flag_values(["--workers", "4"]))
    assert (changed.ray.workers, changed.study.seed) == (4, 3)
    assert changed.model_copy(update={"ray": stored.ray}) == stored
    with pytest.raises(SettingsError, match="--workers: '0'"):
        apply(stored, flag_values(["--workers", "0"]))


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_complete(name: str) -> None:
    settings = load(["--behaviour", name], environ={}).settings
    assert settings.prompts.target.train and settings.prompts.baseline.train
    assert settings.scoring.markers
    assert all(marker == marker.lower().strip() for marker in settings.scoring.markers)
    assert (PRESETS / f"{name}.toml").read_text().startswith("# ")


def test_every_setting_is_documented() -> None:
    assert [key for key, field in leaves() if not field.description] == []
    assert len(FIELDS) > 100


def test_a_behaviour_with_its_own_prompts_needs_no_preset() -> None:
    sides = {side: {"train": {"source": f"{side}.jsonl"}} for side in ("target", "baseline")}
    assert load(environ={}, overrides={"behaviour": "mine", "prompts": sides}).settings.behaviour == "mine"
    with pytest.raises(SettingsError, match="no preset named 'mine'"):
        load(environ={}, overrides={"behaviour": "mine", "prompts": {"target": sides["target"]}})
