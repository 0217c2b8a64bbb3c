"""What edits in training say by now, and what is learned from it: their own behaviour is suppressed, and proper answers
that they are sure of are learned (self-training)."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.plan import TrainingPlan
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning.agreement import Votes
from bruno_ray.learning.material import Teacher
from bruno_ray.learning.trainee import Trainee
from bruno_ray.settings import LearnedSettings

CONFIDENCE = 0.5
"""Probability of each token from which on an edit's own answer is learned, where there are no desired ones."""

SURE_OTHERWISE = 0.8
"""The same for an answer with another token in its least likely place, of all tokens but that one."""


class Renewal:
    """Lets edits answer target train prompts, and sorts what they say."""

    def __init__(self, engine: BatchEngine, teacher: Teacher, bank: DirectionBank, settings: LearnedSettings) -> None:
        self._engine = engine
        self._teacher = teacher
        self._bank = bank
        self._settings = settings
        confidence = settings.confidence
        if confidence is None:
            confidence = 1.0 if teacher.material.answers else CONFIDENCE
        self._confidence = math.inf if confidence == 1 else confidence
        self._said: dict[Hashable, dict[int, tuple[int, ...]]] = {}  # what peers answer to the target prompts

    def changes(self, trainee: Trainee) -> bool:
        """Whether what it says by now is trained on; otherwise it only decides between the starts of one training."""
        plan = trainee.plan
        learns = plan.answers and self._confidence < math.inf
        return bool(trainee.weight("suppress") or plan.inform or plan.entropy or learns)

    def votes(self, plan: TrainingPlan) -> Votes:
        """For the starts of one training, with what its peers say."""
        votes = Votes(self._settings.agreement, self._teacher.asked)
        unknown = {peer.identity: peer for peer in plan.peers if peer.identity not in self._said}
        if unknown:
            edits = self._engine.editor.resolve_all(list(unknown.values()), self._bank)
            answers = self._engine.generate(self._teacher.prompts.target_ids, edits, self._teacher.response_tokens)
            for identity, of_peer in zip(unknown, answers):
                self._said[identity] = {p: answer.token_ids for p, answer in enumerate(of_peer)}
        for peer in plan.peers:
            votes.cast(peer.identity, self._said[peer.identity])
        return votes

    def renew(self, step: int, trainees: Sequence[Trainee]) -> None:
        """Let the edits answer some target train prompts. What still shows the behaviour joins what is suppressed, and
        confident proper answers join what is learned.

        The prompts depend on the step alone: an edit is trained alike beside whichever others.
        """
        engine, teacher = self._engine, self._teacher
        if not trainees:
            return
        prompts = teacher.prompts.target_ids
        chosen = random.Random(step).sample(range(len(prompts)), min(self._settings.renewal_prompts, len(prompts)))
        ids, edits = [prompts[p] for p in chosen], [trainee.trained_factors(engine) for trainee in trainees]
        answers = engine.generate(ids, edits, teacher.response_tokens)
        proper: list[set[int]] = []  # of each trainee
        for trainee, of_edit in zip(trainees, answers):
            given = dict(zip(chosen, of_edit))
            trainee.votes.cast(trainee, {p: answer.token_ids for p, answer in given.items()})
            proper.append(teacher.proper(given))
            trainee.present |= teacher.with_behaviour({p: answer for p, answer in given.items() if p not in proper[-1]})
            for p, answer in given.items():
                trainee.said.pop(p, None)  # what is said anew goes to the end
                if p in proper[-1]:
                    trainee.present.pop(p, None)
                    trainee.said[p] = teacher.as_desired(p, answer)
        if self._confidence < math.inf:
            logprobs = engine.token_logprobs(ids, [[answer.token_ids for answer in each] for each in answers], edits)
            for trainee, edit, of_edit, found, free in zip(trainees, edits, answers, logprobs, proper):
                self._learn(trainee, edit, dict(zip(chosen, of_edit)), dict(zip(chosen, found)), free)
        for trainee in trainees:
            if trainee.plan.inform:
                self._tell_apart(trainee, chosen)

    def _learn(
        self,
        trainee: Trainee,
        edit: ResolvedEdit,
        answers: Mapping[int, Response],
        logprobs: Mapping[int, Tensor],
        proper: set[int],
    ) -> None:
        """Take what it is sure of, of its answers and, where it is not, of those that nearly were."""
        candidates = proper & trainee.votes.agreed(trainee)
        unsure: dict[int, tuple[tuple[int, ...], int]] = {}
        for p, answer in answers.items():
            trainee.sure.pop(p, None)
            if not answer.token_ids:
                continue
            if not math.exp(float(logprobs[p].min())) >= self._confidence:
                unsure[p] = answer.token_ids, int(logprobs[p].argmin())
            elif p in candidates and answer.end_id is not None:
                trainee.sure[p] = self._teacher.as_desired(p, answer)
        if unsure and trainee.plan.inform and self._settings.branches and self._settings.agreement == 1:
            for p, answer in self._otherwise(edit, unsure).items():
                trainee.sure[p] = self._teacher.as_desired(p, answer)

    def _otherwise(self, edit: ResolvedEdit, unsure: Mapping[int, tuple[tuple[int, ...], int]]) -> dict[int, Response]:
        """By prompt, the proper answer whose rest is surest, of those with one of the likeliest tokens in the place
        where the edit was least sure (decoding by branches: Wang and Zhou 2024, https://arxiv.org/abs/2402.10200).

        Where an edit has taken away what decides between ways to go on, the way that the model knows shows in what
        follows. ``unsure``: by prompt, the answer's tokens and that place.
        """
        engine, teacher = self._engine, self._teacher
        heads = {p: (*teacher.prompts.target_ids[p], *tokens[:place]) for p, (tokens, place) in unsure.items()}
        (logits_PV,) = engine.next_logits(list(heads.values()), [edit])
        likeliest = logits_PV.topk(min(self._settings.branches, logits_PV.shape[-1]), dim=-1).indices.tolist()
        tried = [(p, token) for p, tokens in zip(heads, likeliest) for token in tokens if token not in engine.end_ids]
        if not tried:
            return {}
        (tails,) = engine.generate([(*heads[p], token) for p, token in tried], [edit], teacher.response_tokens)
        whole = [(*unsure[p][0][: unsure[p][1]], token, *tail.token_ids) for (p, token), tail in zip(tried, tails)]
        (logprobs,) = engine.token_logprobs([teacher.prompts.target_ids[p] for p, _ in tried], [whole], [edit])
        found: list[tuple[float, int, Response]] = []
        for (p, _), tail, tokens, logprobs_N in zip(tried, tails, whole, logprobs):
            place = unsure[p][1]
            rest_N = torch.cat([logprobs_N[:place], logprobs_N[place + 1 :]])
            if tail.end_id is None or not len(rest_N) or not math.exp(float(rest_N.min())) >= SURE_OTHERWISE:
                continue
            text = engine.tokenizer.decode(list(tokens), skip_special_tokens=True)
            found.append((float(rest_N.min()), p, replace(tail, token_ids=tokens, text=text)))
        best: dict[int, Response] = {}
        for _, p, answer in sorted(found, key=lambda each: -each[0]):
            if p not in best and teacher.proper({p: answer}):
                best[p] = answer
        return {p: best[p] for p in unsure if p in best}

    def _tell_apart(self, trainee: Trainee, chosen: Sequence[int]) -> None:
        """Learn nothing that would do for other prompts as well, and suppress what is said to all of one form."""
        said = {p: text.continuation for p, text in (trainee.said | trainee.sure).items()}
        for p in [p for p in chosen if p in trainee.sure]:
            if not self._teacher.tells(p, said):
                del trainee.sure[p]
        renewed = set(chosen)
        empty = self._teacher.for_any_prompt(trainee.said)
        trainee.present |= {p: texts for p, texts in empty.items() if p in renewed}
