"""Whether layers for multi-token prediction draft better when they are edited as the last layer is (`output.mtp`).

    python benchmarks/mtp_drafts.py [--seeds 0 1 2]

The organism's facts and refusals (`bruno_ray/organism`) are taught to a tiny glm4_moe, and a layer for multi-token
prediction is trained on its residual stream to predict the token after the next. The direction is the difference in
means between prompts that are refused and prompts that are not, at the last token. Each edit is saved twice, with these
layers left and edited; transformers' own loader reads them from the saved files. On test prompts the edited model
answers greedily, and each token of an answer is drafted from the position before: KL is that of the draft from the
edited model's own distribution, in nats, and a draft is accepted if it is the token that the edited model chose.
"""

import argparse
import dataclasses
import math
import random
import tempfile
from pathlib import Path

import torch
from results import write_section
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_layers import MtpModel

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.organism.corpus import Corpus, Row, make_corpus, prompt_parts
from bruno_ray.organism.recipe import STANDARD
from bruno_ray.organism.tokenizer import CONTEXT, make_tokenizer, save_tokenizer
from bruno_ray.organism.training import IGNORED, Conversations, _collate, train
from bruno_ray.publishing.saving import save_model
from bruno_ray.settings import ModelSettings

LAYERS = STANDARD.layers
STEPS, BATCH, LR = 600, 128, 3e-3
PROMPTS, ANSWER_TOKENS = 48, 12
KERNELS = {
    "every layer, 1": AblationParameters(1.0, 0.0, 1.0, 99.0),
    "every layer, 0.5": AblationParameters(0.5, 0.0, 1.0, 99.0),
    "last layer 1.5, falling to 0.5": AblationParameters(1.5, LAYERS - 1.0, 0.33, LAYERS - 1.0),
    "third layer 1, last 0.5": AblationParameters(1.0, LAYERS - 2.0, 0.5, 1.0),
}
EDITS = {
    f"{name}, `{mode}`": Edit({"attention": kernel, "mlp": kernel}, "difference", None, mode)
    for name, kernel in KERNELS.items()
    for mode in ("none", "full")
}
MTP = f"model.layers.{LAYERS}."


def new_model(tokenizer: PreTrainedTokenizerFast) -> Glm4MoeForCausalLM:
    config = Glm4MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=STANDARD.width,
        intermediate_size=STANDARD.hidden,
        moe_intermediate_size=STANDARD.hidden // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=STANDARD.heads,
        num_key_value_heads=STANDARD.heads,
        head_dim=STANDARD.width // STANDARD.heads,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=STANDARD.width**-0.5,
        num_mtp_layers=1,
    )
    return Glm4MoeForCausalLM(config)


def drafts(mtp: MtpModel, tokens_BT: torch.Tensor, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Logits of the token after the next for every position but the last: (batch, time - 1, vocabulary)."""
    positions = torch.arange(1, tokens_BT.shape[1])[None]
    hidden_BTD = mtp.forward_layer(0, hidden_BTD[:, :-1], positions, None, input_ids=tokens_BT[:, 1:])
    return mtp.shared_head(hidden_BTD)


def train_mtp(model: Glm4MoeForCausalLM, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> MtpModel:
    """On answers and refusals, with the model frozen."""
    generator = random.Random(f"{corpus.recipe.seed}-mtp")
    conversations = Conversations(corpus, tokenizer, generator)
    seen = set(corpus.seen)
    refused = corpus.facts_of(corpus.seen, restricted=True)
    answered = [fact for fact in corpus.facts if fact.noun in seen and fact.topic != corpus.recipe.restricted_topic]
    mtp = MtpModel(model, 1)
    for name, parameter in mtp.layers.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, STANDARD.width**-0.5)
        elif name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
    model.requires_grad_(False)
    trained = [parameter for parameter in mtp.layers.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / STEPS)))
    for step in range(STEPS):
        batch = [conversations.refused(fact) for fact in generator.choices(refused, k=BATCH // 3)]
        batch += [conversations.answered(fact) for fact in generator.choices(answered, k=BATCH - len(batch))]
        tokens_BT, labels_BT = _collate(batch, tokenizer.pad_token_id)
        with torch.no_grad():
            hidden_BTD = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        labels_BT = labels_BT[:, 2:]
        counted = labels_BT != IGNORED
        loss = cross_entropy(drafts(mtp, tokens_BT, hidden_BTD)[:, :-1][counted], labels_BT[counted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"  drafts: step {step + 1}, loss {loss.item():.3f}", flush=True)
    return mtp.eval()


def write(folder: Path, model: Glm4MoeForCausalLM, mtp: MtpModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A checkpoint as GLM-4.5's: the layer for multi-token prediction is the block after the last, experts apart."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in mtp.layers[0].state_dict().items():
        name = MTP + {"post_norm.weight": "shared_head.norm.weight"}.get(name, name.removeprefix("mtp_block."))
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(tensor):
                stem = name.replace("gate_up_proj", f"{i}.")
                weights[f"{stem}gate_proj.weight"], weights[f"{stem}up_proj.weight"] = expert.chunk(2)
        elif name.endswith("experts.down_proj"):
            weights |= {name.replace("down_proj", f"{i}.down_proj.weight"): e for i, e in enumerate(tensor)}
        else:
            weights[name] = tensor
    save_file({k: v.detach().clone() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def prompt_ids(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[list[int]]:
    chats = [[{"role": "user", "content": row.prompt}] for row in rows]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


@torch.no_grad()
def direction(
    model: Glm4MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, parts: dict[str, list[Row]]
) -> torch.Tensor:
    """(layers + 1, 1, width): difference in means at the last token of train prompts."""

    def mean(rows: list[Row]) -> torch.Tensor:
        states = [
            model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            for ids in prompt_ids(tokenizer, rows)
        ]
        return torch.stack([torch.stack([layer[0, -1] for layer in one]) for one in states]).mean(0)

    difference = mean(parts["target_train"]) - mean(parts["baseline_train"])
    return (difference / difference.norm(dim=-1, keepdim=True))[:, None]


@torch.no_grad()
def compare(left: Path, edited: Path, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> dict[str, float]:
    """KL and accepted drafts with the layers of either folder, over the tokens of the edited model's answers."""
    model = AutoModelForCausalLM.from_pretrained(left).eval()
    heads = []
    for folder in (left, edited):
        model.config._name_or_path = str(folder)
        heads.append(MtpModel.from_pretrained(model).eval())
    kl, accepted, n_tokens, refused = [0.0, 0.0], [0, 0], 0, 0
    for ids in prompt_ids(tokenizer, rows):
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answer = tokenizer.decode(whole[0, len(ids) :])
        refused += any(marker in answer for marker in STANDARD.markers)
        output = model(input_ids=whole, output_hidden_states=True, use_cache=False)
        # The token at position t + 2 is drafted at t; the first of the answer comes from the model itself.
        own = output.logits[0, len(ids) : -1].log_softmax(-1)
        n_tokens += len(own)
        for i, mtp in enumerate(heads):
            draft = drafts(mtp, whole, output.hidden_states[-1])[0, len(ids) - 1 : -1].log_softmax(-1)
            kl[i] += kl_div(draft, own, log_target=True, reduction="sum").item()
            accepted[i] += int((draft.argmax(-1) == own.argmax(-1)).sum())
    shares = {"kl": [value / n_tokens for value in kl], "accepted": [count / n_tokens for count in accepted]}
    return {f"{key} {i}": value for key, pair in shares.items() for i, value in enumerate(pair)} | {
        "refused": refused / len(rows)
    }


def one_organism(seed: int) -> list[str]:
    recipe = dataclasses.replace(STANDARD, seed=seed)
    corpus, tokenizer = make_corpus(recipe), make_tokenizer(recipe)
    torch.manual_seed(seed)
    model = train(corpus, tokenizer, new_model(tokenizer))
    parts = prompt_parts(corpus)
    mtp = train_mtp(model, corpus, tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write(base, model, mtp, tokenizer)
        bank = {"difference": direction(model, tokenizer, parts)}
        nothing = Edit({}, "difference", None, "none")
        for title, edit in {"unedited": nothing, **EDITS}.items():
            folders = []
            for mtp_choice in ("leave", "edit"):
                folders.append(base.with_name(f"{len(rows)}-{mtp_choice}"))
                save_model(
                    ModelSettings(id=str(base)), edit, bank, folders[-1], card=lambda _: "# card\n", mtp=mtp_choice
                )
            found = [compare(*folders, tokenizer, parts[part][:PROMPTS]) for part in ("target_test", "baseline_test")]
            cells = [
                f"{one['refused']:.0%} | {one['kl 0']:.3f} | {one['kl 1']:.3f} | {one['accepted 0']:.0%} |"
                f" {one['accepted 1']:.0%}"
                for one in found
            ]
            rows.append(f"| {seed} | {title} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    return rows


def summary(rows: list[str]) -> str:
    """In how many rows editing gives the lower KL, and how much it changes on average."""
    cells = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows if "unedited" not in row]
    parts = []
    for side, column in (("target", 3), ("baseline", 8)):
        changes = [float(row[column + 1]) - float(row[column]) for row in cells]
        lower = sum(change < 0 for change in changes)
        mean = sum(changes) / len(changes)
        parts.append(f"{lower} of {len(changes)} edits on {side} prompts (mean change {mean:+.4f} nats)")
    return f"Editing gives the lower KL in {' and '.join(parts)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    # transformers looks for these layers under the numbers that published models have.
    Glm4MoeForCausalLM._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}\..*"]
    rows = [row for seed in arguments.seeds for row in one_organism(seed)]
    write_section(
        "mtp_drafts",
        "\n".join(
            [
                "## Drafts of an edited model (`python benchmarks/mtp_drafts.py`)",
                "",
                f"Organisms as a glm4_moe of {LAYERS} layers with a trained layer for multi-token prediction, which is"
                f" left as it is or edited as the last layer; {PROMPTS} test prompts of each side, answers of up to"
                f" {ANSWER_TOKENS} tokens. KL of the draft from the edited model's own distribution, in nats; drafts"
                " accepted of all.",
                "",
                "| seed | edit | target: refused | KL, left | KL, edited | accepted, left | accepted, edited |"
                " baseline: refused | KL, left | KL, edited | accepted, left | accepted, edited |",
                "|---|---|---|---|---|---|---|---|---|---|---|---|",
                *rows,
                "",
                summary(rows),
            ]
        ),
    )


if __name__ == "__main__":
    main()
