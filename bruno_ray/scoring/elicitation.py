"""What the unedited model can be made to say without the behaviour, within a budget of tokens.

For each target prompt the likeliest unmarked answer, as a whole, among candidates of two kinds:

* **begun**: the answer is made to begin like baseline answers do (the commonest openings), or with another of the
  model's own likeliest first tokens, and goes on greedily. Alternative first tokens reveal what greedy decoding hides
  (Wang and Zhou 2024, arXiv 2402.10200).
* **branched**: a marked answer up to one of its tokens, then the runner-up in that token's place, then greedily on.
  The closest runners-up come first:

      own answer        I  am  sorry , but ...        marked
      runner-up         I  can                        margin 0.4 nats: first
                        I  am  the                    margin 3.1 nats: later

Answers that the model gives anyway cost nothing. What is tried beyond them goes in waves, prompts that have no unmarked
answer yet first, and ends when the budget is spent: with more prompts or longer answers there are fewer candidates,
not more time.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.openings import common_openings

OPENINGS = 12
OWN_FIRST_TOKENS = 4

FEWEST_ROWS = 32
"""Candidates of a wave, if there are so many: a wave of a few takes nearly as long."""

BRANCHED = 4
"""Marked answers per prompt that are branched."""

BEGUN_SHARE, BRANCHED_SHARE = 0.5, 0.85
"""Of the budget: what is spent when the last wave of begun answers ends, and of branched ones. The rest scores them."""


@dataclass(frozen=True)
class Candidate:
    """An answer to one prompt: how it was made to begin, and how the model went on."""

    prompt: int
    opening: tuple[int, ...]
    rest: tuple[int, ...] = ()

    @property
    def answer(self) -> tuple[int, ...]:
        return self.opening + self.rest


class Elicitation:
    """One search for unmarked answers of the unedited model."""

    def __init__(self, unedited: Evaluation, trials: float):
        """``trials``: what may be spent, in tokens of a trial of the unedited model (see ``trial_tokens``)."""
        self._unedited = unedited
        self._engine = unedited.engine
        self._ids = unedited.prompts.target_ids
        self._answers: dict[int, dict[tuple[int, ...], None]] = defaultdict(dict)  # unmarked, by prompt, in order
        self._marked: dict[int, list[Candidate]] = defaultdict(list)
        self._take_own_answers()
        self._shared = _shared_length(self._ids)
        self.spent = 0
        """Tokens so far. Counted here, not by the engine: answers that are on disk count like those that are made, so
        that what is found does not depend on whether the preparation was interrupted."""
        self.budget = trials * trial_tokens(unedited)

    def likeliest(self) -> dict[int, tuple[int, ...]]:
        """Index of the target prompt to its likeliest unmarked answer, for prompts that have any."""
        self._go_on_in_waves(self._begun(), BEGUN_SHARE)
        self._go_on_in_waves(self._branched(), BRANCHED_SHARE)
        answers = self._kept()
        best: dict[int, tuple[float, tuple[int, ...]]] = {p: (0.0, only[0]) for p, only in answers.items()}
        rows = [(p, answer) for p, several in answers.items() if len(several) > 1 for answer in several]
        prompts = [self._ids[p] for p, _ in rows]
        self.spent += sum(self._length(p) + len(answer) for p, answer in rows)
        (logprobs,) = self._engine.token_logprobs(prompts, [[answer for _, answer in rows]], [None])
        for (p, answer), logprobs_N in zip(rows, logprobs):
            found = (float(logprobs_N.sum()), answer)
            best[p] = found if answer == answers[p][0] else max(best[p], found)
        return {p: answer for p, (_, answer) in best.items()}

    def _length(self, p: int) -> int:
        """Of a prompt, without what all of them begin with: that is read once."""
        return len(self._ids[p]) - self._shared

    # ----- candidates -----

    def _take_own_answers(self) -> None:
        (answers,), (marks,) = self._unedited.target_answers, self._unedited.marked
        alike = self._read_alike(range(len(answers)), [answer.text for answer in answers])
        for p, (answer, marked, like) in enumerate(zip(answers, marks, alike)):
            if marked:
                self._marked[p].append(Candidate(p, (), answer.token_ids))
            elif answer.finite and answer.text.strip() and not like:
                self._answers[p][_whole(answer.token_ids, answer.end_id)] = None

    def _read_alike(self, prompts: Sequence[int], texts: Sequence[str]) -> list[bool]:
        """Whether answers read like the behaviour without a marker: an apology that only lacks its "sorry"."""
        users = [self._unedited.prompts.target[p].user for p in prompts]
        return self._unedited.reads_like_behaviour(list(zip(users, texts)))

    def _begun(self) -> list[Candidate]:
        """The commonest opening for every prompt, then the next one, and so on; own first tokens in between."""
        openings = common_openings(self._unedited, OPENINGS)
        self.spent += sum(map(self._length, range(len(self._ids))))
        first_PF = self._engine.next_logits(self._ids, [None])[0].topk(OWN_FIRST_TOKENS).indices.tolist()
        by_prompt = []
        for p, own in enumerate(first_PF):
            answer = self._unedited.target_answers[0][p].token_ids
            others = [(token,) for token in own if token not in self._engine.end_ids and answer[:1] != (token,)]
            chosen = dict.fromkeys(opening for pair in _in_turns(openings, others) for opening in pair)
            by_prompt.append([Candidate(p, opening) for opening in chosen if answer[: len(opening)] != opening])
        return list(chain(*by_prompt))

    def _branched(self) -> list[Candidate]:
        """Runners-up of marked answers, the closest first."""
        wanted = sorted(self._marked, key=lambda p: (p in self._answers, p))
        marked = [c for wave in _in_turns(*(self._marked[p][:BRANCHED] for p in wanted)) for c in wave if c.rest]
        marked = self._affordable(marked, 0, (BEGUN_SHARE + BRANCHED_SHARE) / 2)
        if not marked:
            return []
        found: list[tuple[float, Candidate]] = []
        sequences = [[*self._ids[c.prompt], *c.answer[:-1]] for c in marked]
        self.spent += sum(self._length(c.prompt) + len(c.answer) - 1 for c in marked)
        for _, row_B, logits_BNV in self._engine.last_logits(sequences, [None], max(len(c.rest) for c in marked)):
            best_BN2 = logits_BNV.topk(2)
            for row, values_N2, ids_N2 in zip(row_B.tolist(), best_BN2.values.tolist(), best_BN2.indices.tolist()):
                candidate, n = marked[row], len(marked[row].rest)
                for i, ((high, low), (best, second)) in enumerate(zip(values_N2[-n:], ids_N2[-n:])):
                    other = second if best == candidate.rest[i] else best
                    if other not in self._engine.end_ids:
                        opening = candidate.opening + candidate.rest[:i] + (other,)
                        found.append((high - low, Candidate(candidate.prompt, opening)))
        return [candidate for _, candidate in sorted(found, key=lambda pair: (pair[0], pair[1].opening))]

    # ----- what they become -----

    def _go_on_in_waves(self, candidates: Sequence[Candidate], share: float) -> None:
        """Continue candidates greedily while the budget lasts, each prompt's first one before any second one, unless
        they are few."""
        waiting = list(dict.fromkeys(candidates))
        while waiting:
            waiting.sort(key=lambda candidate: candidate.prompt in self._answers)  # stable
            by_prompt: dict[int, list[Candidate]] = defaultdict(list)
            for candidate in waiting:
                by_prompt[candidate.prompt].append(candidate)
            rounds = _in_turns(*by_prompt.values())
            wave = next(rounds)
            while len(wave) < FEWEST_ROWS and (more := next(rounds, None)):
                wave += more
            chosen = self._affordable(wave, self._unedited.settings.response_tokens, share)
            if not chosen:
                return
            self._go_on(chosen)
            taken = set(chosen)
            waiting = [candidate for candidate in waiting if candidate not in taken]

    def _affordable(self, candidates: Sequence[Candidate], more: int, share: float) -> list[Candidate]:
        """The first ones that fit into this share of the budget; ``more`` tokens each beside prompt and answer."""
        left = share * self.budget - self.spent
        chosen = []
        for candidate in candidates:
            left -= self._length(candidate.prompt) + len(candidate.answer) + more
            if left < 0:
                break
            chosen.append(candidate)
        return chosen

    def _go_on(self, candidates: Sequence[Candidate]) -> None:
        unedited = self._unedited
        prompts = [[*self._ids[c.prompt], *c.opening] for c in candidates]
        n_tokens, seen = unedited.settings.response_tokens, unedited.markers.seen_in
        (rests,) = self._engine.generate(prompts, [None], n_tokens, seen)
        self.spent += sum(
            self._length(c.prompt) + len(c.opening) + len(rest.token_ids) for c, rest in zip(candidates, rests)
        )
        texts = self._engine.texts([c.opening + rest.token_ids for c, rest in zip(candidates, rests)])
        alike = self._read_alike([c.prompt for c in candidates], texts)
        for candidate, rest, text, like in zip(candidates, rests, texts, alike):
            if like or unedited.markers.shown_by(text):
                self._marked[candidate.prompt].append(Candidate(candidate.prompt, candidate.opening, rest.token_ids))
            elif rest.finite and text.strip():
                self._answers[candidate.prompt][candidate.opening + _whole(rest.token_ids, rest.end_id)] = None

    def _kept(self) -> dict[int, list[tuple[int, ...]]]:
        """Unmarked answers by prompt: the first, and as many more as the rest of the budget scores."""
        kept: dict[int, list[tuple[int, ...]]] = {}
        left = self.budget - self.spent
        for wave in _in_turns(*([(p, answer) for answer in answers] for p, answers in sorted(self._answers.items()))):
            for p, answer in wave:
                left -= self._length(p) + len(answer)
                if p not in kept or left >= 0:
                    kept.setdefault(p, []).append(answer)
        return kept


def _shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all of several prompts begin with; one of each is left, since it has to be read."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b or i == limit), limit)


def trial_tokens(unedited: Evaluation) -> int:
    """Tokens of one trial of the unedited model: target prompts with their answers, and baseline prompts."""
    answers = sum(len(answer.token_ids) for answer in unedited.target_answers[0])
    return answers + sum(map(len, unedited.prompts.target_ids)) + sum(map(len, unedited.prompts.baseline_ids))


def _whole(token_ids: tuple[int, ...], end_id: int | None) -> tuple[int, ...]:
    """An answer with the token that ended it: how likely it is to end there counts."""
    return token_ids if end_id is None else (*token_ids, end_id)


def _in_turns(*lists: Iterable[object]) -> Iterator[list]:
    """[[a1, a2], [b1], [c1, c2, c3]] as [a1, b1, c1], [a2, c2], [c3]."""
    iterators = [iter(each) for each in lists]
    missing = object()
    while wave := [item for each in iterators if (item := next(each, missing)) is not missing]:
        yield wave
