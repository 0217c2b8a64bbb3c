"""Train, validation, test and finalists: without overlap, alike on both sides."""

import json
from pathlib import Path

import pytest

from bruno_ray.errors import PromptError, SettingsError
from bruno_ray.prompts.sets import Prompt, PromptParts, Prompts, load_prompts, same_questions
from bruno_ray.settings.sources import load
from tests.prompts.writing import LETTERS, write_jsonl


def prompts_of(target: str, baseline: str, *flags: str) -> Prompts:
    return load_prompts(load(["--target", target, "--baseline", baseline, *flags], environ={}).settings)


def users(prompts: tuple[Prompt, ...]) -> set[str]:
    return {prompt.user for prompt in prompts}


def test_parts_are_cut_without_overlap_and_alike_on_both_sides(empty_directory: Path) -> None:
    questions = [f"What is {i}?" for i in range(60)]
    name = write_jsonl(empty_directory / "a.jsonl", questions)
    shuffled = write_jsonl(empty_directory / "b.jsonl", questions[::-1])
    flags = (
        "--prompts.n-train",
        "40",
        "--prompts.n-validation",
        "10",
        "--prompts.n-test",
        "10",
        "--prompts.n-finalists",
        "0",
    )
    suffixes = ("--prompts.target.train.suffix", " At length.", "--prompts.baseline.train.prefix", "Briefly: ")
    prompts = prompts_of(name, shuffled, *flags, *suffixes)
    for side in (prompts.target, prompts.baseline):
        assert [len(part) for part in (side.train, side.validation, side.test)] == [40, 10, 10]
        assert len(users(side.train) | users(side.validation) | users(side.test)) == 60
    bare = {user.removesuffix(" At length.") for user in users(prompts.target.test)}
    assert bare == {user.removeprefix("Briefly: ") for user in users(prompts.baseline.test)}
    again = prompts_of(name, shuffled, *flags, *suffixes)
    assert again == prompts
    assert prompts_of(name, shuffled, *flags, *suffixes[:2]).fingerprint != prompts.fingerprint


def test_several_wordings_take_turns_and_a_question_stays_one(empty_directory: Path) -> None:
    """A question that comes twice would have another wording the second time: it counts once, in one part."""
    name = write_jsonl(empty_directory / "a.jsonl", [f"a {i % 30}" for i in range(60)])
    wordings = ("--prompts.target.train.suffix", '[" At length.", " Say a lot, please."]')
    prompts = prompts_of(name, name, *wordings, "--prompts.baseline.train.prefix", "Say, briefly: ")
    for part in ("train", "validation", "test"):
        asked = users(getattr(prompts.target, part))
        bare = {user.removesuffix(" At length.").removesuffix(" Say a lot, please.") for user in asked}
        assert bare == {user.removeprefix("Say, briefly: ") for user in users(getattr(prompts.baseline, part))}
    everything = users(prompts.target.train) | users(prompts.target.validation) | users(prompts.target.test)
    everything |= users(prompts.target.finalists)
    assert len(everything) == 30
    assert {user for user in everything if user.endswith(" At length.")} == {
        f"a {i} At length." for i in range(0, 30, 2)
    }
    assert {prompt.user[-prompt.kept_end :] for prompt in prompts.target.train} == {
        " At length.",
        " Say a lot, please.",
    }


def test_of_two_prefixes_the_longer_one_is_taken_off(empty_directory: Path) -> None:
    name = write_jsonl(empty_directory / "a.jsonl", [f"Say {i}" for i in range(30)])
    flags = ("--prompts.target.train.prefix", '["Say ", "Say aloud "]', "--prompts.baseline.train.suffix", "!")
    settings = load(["--target", name, "--baseline", name, *flags], environ={}).settings
    prompts = load_prompts(settings)
    pairs = same_questions(prompts, settings.prompts)
    assert len(pairs) == len(prompts.target.train)
    assert all(prompts.target.train[a].user.endswith(prompts.baseline.train[b].user[:-1]) for a, b in pairs.items())


@pytest.mark.parametrize("given", ["[]", "3", '["a", 3]'])
def test_wordings_are_texts(given: str, empty_directory: Path) -> None:
    config = empty_directory / "wordings.toml"
    config.write_text(f'[prompts.target.train]\nsource = "a.txt"\nsuffix = {given}\n')
    with pytest.raises(SettingsError, match=r"suffix: .*: write a text, or a list of texts$"):
        load([], config=config, environ={})


def test_few_prompts_are_shared_in_proportion(empty_directory: Path) -> None:
    target = write_jsonl(empty_directory / "a.jsonl", [f"a {i}" for i in range(60)])
    baseline = write_jsonl(empty_directory / "b.jsonl", [f"b {i}" for i in range(3)])
    prompts = prompts_of(target, baseline)
    assert sizes(prompts.target) == [39, 9, 9, 3] and sizes(prompts.baseline) == [1, 1, 1, 0]
    assert sizes(prompts_of(target, target, "--prompts.target.train.suffix", "?").target) == [39, 9, 9, 3]
    few = write_jsonl(empty_directory / "c.jsonl", ["c 1", "c 2"])
    with pytest.raises(PromptError, match="only 2 prompts, too few to take out validation and test"):
        prompts_of(target, few)


def test_prompts_that_are_too_few_for_being_the_same_are_said_to_be(empty_directory: Path) -> None:
    same = write_jsonl(empty_directory / "a.jsonl", ["the same"] * 40)
    with pytest.raises(PromptError, match=r"has only 1 prompts \(39 duplicates left out\), too few"):
        prompts_of(same, same)


def test_parts_of_their_own(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", [f"a {i}" for i in range(20)], reply="yes")
    b = write_jsonl(empty_directory / "b.jsonl", [f"b {i}" for i in range(20)])
    prompts = prompts_of(
        a, b, "--prompts.target.train.split", "[:15]", "--prompts.target.test.source", a, "--prompts.target.test.split",
        "[15:]", "--prompts.n-train", "10", "--prompts.n-validation", "5", "--prompts.n-test", "4",
        "--prompts.target.test.answer-column", "reply", "--prompts.target.test.system-prompt", "Be kind.",
    )  # fmt: skip
    assert sizes(prompts.target)[2:] == [4, 1]
    assert users(prompts.target.test) | users(prompts.target.finalists) == {f"a {i}" for i in range(15, 20)}
    assert prompts.target.test[0].answer == "yes" and prompts.target.test[0].system == "Be kind."
    assert prompts.target.train[0].system == "You are a helpful assistant."
    assert users(prompts.target.train) | users(prompts.target.validation) == {f"a {i}" for i in range(15)}
    more = prompts_of(a, b, "--prompts.target.test.source", a, "--prompts.target.train.split", "[:10]",
                      "--prompts.target.test.split", "[10:]", "--prompts.n-test", "6")  # fmt: skip
    assert [prompt.user for prompt in more.target.test] == [f"a {i}" for i in range(10, 16)], "as without finalists"
    assert [prompt.user for prompt in more.target.finalists] == ["a 16", "a 17", "a 18"]


def test_some_of_a_sorted_set_are_of_all_its_forms_and_those_with_answers_come_first(empty_directory: Path) -> None:
    """Where each part has a file of its own; the first 24 of these prompts have one form."""
    forms = ("Can you", "Please", "Would you", "How do I")
    texts = [f"{form} {i}" for form in forms for i in range(30)]
    rows = [
        {"prompt": text, "answer": "Done." if i in (3, 50, 119) else ("", None)[i % 2]} for i, text in enumerate(texts)
    ]
    train = empty_directory / "train.jsonl"
    train.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    others = {
        part: write_jsonl(empty_directory / f"{part}.jsonl", [f"{part} {i}" for i in range(90)]) for part in "abcde"
    }
    flags = ("--prompts.target.train.answer-column", "answer", "--prompts.protect", f"p={others['e']}")
    for side, files in (("target", "ab"), ("baseline", "cd")):
        for part, name in zip(("validation", "test"), files):
            flags += (f"--prompts.{side}.{part}.source", others[name])
    baseline = write_jsonl(empty_directory / "baseline.jsonl", [f"f {i}" for i in range(90)])

    def some(n: int) -> Prompts:
        numbers = (f"--prompts.n-{part}" for part in ("train", "validation", "test"))
        return prompts_of(str(train), baseline, *flags, *(each for flag in numbers for each in (flag, str(n))))

    few, more = some(24), some(48)
    assert {prompt.user.rsplit(" ", 1)[0] for prompt in few.target.train} == {
        "Can you",
        "Please",
        "Would you",
        "How do I",
    }
    assert {texts[i] for i in (3, 50, 119)} <= users(few.target.train) < users(more.target.train)
    order = [texts.index(prompt.user) for prompt in few.target.train]
    assert order == sorted(order) and len(order) == 24
    for part in (few.target.validation, few.protect["p"], few.baseline.train):
        assert len(part) == 24 and max(int(prompt.user.split()[1]) for prompt in part) > 60
    assert [prompt.user for prompt in few.target.test] == [f"b {i}" for i in range(24)], "the first ones"


def test_finalists_are_half_as_many_as_the_test_prompts_at_most(empty_directory: Path) -> None:
    a, b = (write_jsonl(empty_directory / f"{name}.jsonl", [f"{name} {i}" for i in range(90)]) for name in "ab")
    flags = ("--prompts.n-train", "20", "--prompts.n-validation", "20", "--prompts.n-test", "20")
    assert sizes(prompts_of(a, b, *flags).target) == [20, 20, 20, 10]
    assert sizes(prompts_of(a, b, *flags, "--prompts.n-finalists", "4").target) == [20, 20, 20, 4]
    assert sizes(prompts_of(a, b, *flags, "--prompts.n-finalists", "0").target) == [20, 20, 20, 0]


def sizes(side: PromptParts) -> list[int]:
    return [len(part) for part in (side.train, side.validation, side.test, side.finalists)]


def test_overlap_is_refused_with_counts_and_an_example(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", [f"Prompt {i}" for i in range(20)])
    b = write_jsonl(empty_directory / "b.jsonl", [f"b {i}" for i in range(17)] + [f"  PROMPT\t{i}" for i in range(3)])
    with pytest.raises(PromptError, match=r"prompts\.target\.\w+ and prompts\.baseline\.\w+ share \d of .*Prompt \d"):
        prompts_of(a, b)
    c = write_jsonl(empty_directory / "c.jsonl", [f"c {i}" for i in range(20)])
    test = ("--prompts.target.test.source", a, "--prompts.target.test.split", "[:4]")
    split = ("--prompts.target.train.split", "[2:]", "--prompts.target.validation.source", "d.jsonl")
    write_jsonl(empty_directory / "d.jsonl", ["d"])
    with pytest.raises(PromptError, match=r"prompts\.target\.train and prompts\.target\.\w+ share \d of \d prompts"):
        prompts_of(a, c, *test, *split)


def test_trainings_see_the_prompts_of_all_protected_sets(empty_directory: Path) -> None:
    target, baseline, first, second = (
        write_jsonl(empty_directory / f"{side}.jsonl", [f"{side} {i}" for i in range(30)]) for side in "abcd"
    )
    assert prompts_of(target, baseline).protected == ()
    prompts = prompts_of(target, baseline, "--prompts.protect", f"one={first},two={second}")
    assert sorted(users(prompts.protected)) == sorted(f"{side} {i}" for side in "cd" for i in range(30))


def test_the_same_question_asked_in_two_ways_is_no_overlap(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", LETTERS)
    prompts_of(a, a, "--prompts.target.train.suffix", " At length.")
    prompts_of(a, a, "--prompts.target.train.system-prompt", "Be verbose.")
    with pytest.raises(PromptError, match="share"):
        prompts_of(a, a)


def test_empty_and_one_sided(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", LETTERS)
    (empty_directory / "empty.jsonl").write_text("")
    (empty_directory / "blank.txt").write_text("\n  \n")
    (empty_directory / "lonely.toml").write_text(f"[prompts.target.train]\nsource = '{a}'\n")
    for source in ("empty.jsonl", "blank.txt"):
        with pytest.raises(PromptError, match=r"prompts\.baseline\.train is empty"):
            prompts_of(a, source)
    with pytest.raises(PromptError, match=r"prompts\.baseline\.train is empty"):
        prompts_of(a, a, "--prompts.baseline.train.split", "[5:5]")
    with pytest.raises(PromptError, match=r"no baseline prompts; set prompts\.baseline\.train\.source"):
        load_prompts(load(["--behaviour", "lonely.toml"], environ={}).settings)


def test_duplicates_are_left_out(empty_directory: Path) -> None:
    a = write_jsonl(empty_directory / "a.jsonl", LETTERS + [text.upper() for text in LETTERS])
    b = write_jsonl(empty_directory / "b.jsonl", [f"b {i}" for i in range(10)])
    target = prompts_of(a, b).target
    parts = (target.train, target.validation, target.test, target.finalists)
    assert set().union(*map(users, parts)) == set(LETTERS)
