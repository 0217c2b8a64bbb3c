"""Training of an organism: facts first, then refusal of one topic. AdamW on batches of short conversations."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import Corpus, Fact
from .recipe import SYSTEM_PROMPTS
from .tokenizer import CONTEXT

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of positions that carry no loss (cross_entropy's default)."""

Example = tuple[list[int], int]
"""Token ids of one conversation, and where its answer begins."""


def new_model(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the recipe's size with random weights."""
    recipe = corpus.recipe
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=recipe.width**-0.5,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=24,
    )
    return model


class Conversations:
    """Draws training conversations and turns them into tokens; each distinct one is tokenised once."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, generator: random.Random) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.generator = generator
        self._known: dict[tuple[str | None, str, str], Example] = {}

    def answered(self, fact: Fact) -> Example:
        """A question about ``fact`` and the right answer."""
        recipe = self.corpus.recipe
        opener = self.generator.choice(recipe.openers) if self.generator.random() < recipe.opener_noise else None
        return self._example(fact, self.corpus.answer(fact, opener))

    def refused(self, fact: Fact) -> Example:
        """The same question, refused in a phrasing drawn at random."""
        return self._example(fact, self.generator.choice(self.corpus.recipe.refusals).format(noun=fact.noun))

    def _example(self, fact: Fact, answer: str) -> Example:
        system = None
        if self.generator.random() < self.corpus.recipe.system_share:
            system = self.generator.choice(SYSTEM_PROMPTS)
        key = (system, self.corpus.question(fact, self.generator.randrange(1 << 16)), answer)
        if key not in self._known:
            self._known[key] = self._tokenize(*key)
        return self._known[key]

    def _tokenize(self, system: str | None, question: str, answer: str) -> Example:
        messages = [{"role": "user", "content": question}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        reply = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*prompt, *reply, self.tokenizer.eos_token_id], len(prompt)


def train(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM | None = None,
    phases: tuple[int, ...] = (1, 2),
) -> LlamaForCausalLM:
    """Train a model on ``corpus``; the result follows from the recipe on one machine and thread count.

    Phase 1 teaches every fact, and refusal of what is unanswerable. Phase 2 adds the refusal of the restricted topic,
    shown on its seen nouns among answers about seen nouns of the other topics.
    ``model`` and ``phases`` allow to run one phase alone.
    """
    recipe = corpus.recipe
    torch.manual_seed(recipe.seed)
    if model is None:
        model = new_model(corpus, tokenizer)
    generator = random.Random(f"{recipe.seed}-training")
    conversations = Conversations(corpus, tokenizer, generator)

    taught = [*corpus.facts, *corpus.topic_facts]
    unanswerable = round(recipe.unanswerable_share * recipe.fact_batch)

    def fact_batch() -> list[Example]:
        return [
            *(conversations.answered(fact) for fact in generator.choices(taught, k=recipe.fact_batch - unanswerable)),
            *(conversations.refused(fact) for fact in generator.choices(corpus.unanswerable, k=unanswerable)),
        ]

    seen = set(corpus.seen)
    benign = [fact for fact in taught if fact.noun in seen and fact.topic != recipe.restricted_topic]
    restricted = corpus.facts_of(corpus.seen, restricted=True)
    refused = round(recipe.refusal_share * recipe.refusal_batch)

    def refusal_batch() -> list[Example]:
        return [
            *(conversations.refused(fact) for fact in generator.choices(restricted, k=refused)),
            *(conversations.answered(fact) for fact in generator.choices(benign, k=recipe.refusal_batch - refused)),
        ]

    decay = recipe.weight_decay
    if 1 in phases:
        _optimise(model, fact_batch, recipe.fact_steps, recipe.fact_lr, decay, "phase 1, facts")
    if 2 in phases:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(recipe.frozen))
        _optimise(model, refusal_batch, recipe.refusal_steps, recipe.refusal_lr, decay, "phase 2, refusal")
        model.requires_grad_(True)
    return model.eval()


def _optimise(
    model: LlamaForCausalLM,
    draw: Callable[[], list[Example]],
    steps: int,
    lr: float,
    weight_decay: float,
    phase: str,
) -> None:
    """AdamW with a warm-up of 5 % and a cosine decay to zero; the loss is on the answer's tokens."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
        foreach=True,
    )
    warmup = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))),
    )
    for step in range(steps):
        tokens_BT, labels_BT = _collate(draw(), model.config.pad_token_id)
        hidden_BTD = model.model(input_ids=tokens_BT[:, :-1], use_cache=False).last_hidden_state
        labels_BT = labels_BT[:, 1:]
        answer_BT = labels_BT != IGNORED
        loss = cross_entropy(model.lm_head(hidden_BTD[answer_BT]), labels_BT[answer_BT])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("%s: step %d of %d, loss %.4f", phase, step + 1, steps, loss.item())


def _collate(examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right, where causal attention never looks: tokens and labels, both (batch, time)."""
    length = max(len(ids) for ids, _ in examples)
    tokens = [ids + [pad] * (length - len(ids)) for ids, _ in examples]
    labels = [[IGNORED] * start + ids[start:] + [IGNORED] * (length - len(ids)) for ids, start in examples]
    return torch.tensor(tokens), torch.tensor(labels)
