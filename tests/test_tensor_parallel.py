"""Live edits on a model whose weights transformers has spread over two processes (tensor parallel, gloo on CPUs)."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.writers import Matrix
from tests.support import tiny_models

MODES = ("none", "pre", "full")
IDS = torch.arange(24).view(2, 12) * 7 % 250


def free_port() -> int:
    with socket.socket() as open_socket:
        open_socket.bind(("127.0.0.1", 0))
        return open_socket.getsockname()[1]


def test_a_spread_weight_is_read_as_a_whole_and_not_written() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        module = nn.Linear(8, 4)
        whole = module.weight.detach().clone()
        module.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(1)]))
        matrix = Matrix(module, "weight", "o_proj", 4)
        assert type(matrix.read()) is torch.Tensor and torch.equal(matrix.read(), whole)
        with pytest.raises(ModelError, match="o_proj is spread over processes"):
            matrix.check_writable()
    finally:
        dist.destroy_process_group()


def logits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Unedited, and under an edit in each norm mode."""
    architecture = find_architecture(model)
    shape = (architecture.n_layers + 1, 1, architecture.d_model)
    directions = nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(2)), dim=-1)
    components = dict.fromkeys(architecture.components, AblationParameters(1.0, 1.0, 0.5, 3.0))
    editor = LiveEditor(architecture)
    with torch.no_grad():
        found = {"unedited": model(IDS).logits.clone()}
        for mode in MODES:
            (edit,) = editor.resolve_all([Edit(components, "r", 1.3, mode)], {"r": directions})
            editor.set([edit], [0, 0])
            found[mode] = model(IDS).logits.clone()
            editor.clear()
    editor.close()
    return found


def one_of_two(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto", device_mesh=mesh).eval()
    weight = model.model.layers[0].self_attn.o_proj.weight
    assert isinstance(weight, DTensor) and weight.to_local().numel() == weight.numel() // 2
    found = logits(model)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.nightly
def test_two_processes_say_what_one_says_under_edits_of_every_norm_mode(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    mp.spawn(one_of_two, args=(str(tmp_path), free_port()), nprocs=2)
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
    found = torch.load(tmp_path / "found.pt")
    for name, of_one in wanted.items():
        torch.testing.assert_close(found[name], of_one, rtol=1e-4, atol=1e-4)
    assert all((wanted[mode] - wanted["unedited"]).abs().max() > 0.1 for mode in MODES)
