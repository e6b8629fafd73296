"""DeepSpeed's ZeRO, through Accelerate: optimiser states (stage 1), gradients (2) and weights (3) in parts, one a rank.

What is computed is what DDP computes. DeepSpeed averages the gradients over the ranks, so that the factor W of
docs/method.md holds; weights stay float32 and precision is autocast's alone; parameters that no loss reached keep
value and states. The JSON says how it is shared out and sent, and nothing of what is optimised.
"""

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, convert_outputs_to_fp32
from torch import Tensor, nn

from cclmpc_dist.config import Config
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.training.checkpoint import Tensors, pack_optimizer, unpack_optimizer
from cclmpc_dist.training.strategy import Strategy, optimizer

DECIDED = {  # keys of DeepSpeed's JSON -> the settings that decide in their place
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "optimizer": "optim",
    "scheduler": "optim",
    "gradient_clipping": "optim.clip",
    "gradient_accumulation_steps": "accumulate",
    "train_batch_size": "data.batch_labelled and data.batch_unlabelled",
    "train_micro_batch_size_per_gpu": "data.batch_labelled and data.batch_unlabelled",
}
SHARING = {  # the keys of zero_optimization that change no number
    "stage",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "sub_group_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
}
MEAN = {"gradient_allreduce_op": "mean"}  # what the losses' factor W asks for
FIRST_SCALE, DOUBLED_AFTER = 2.0**16, 2000  # of the loss under fp16, as torch's GradScaler


class Plugin(DeepSpeedPlugin):
    """Accelerate's, without the reference that only the package transformers reads, and needs that package for."""

    def set_deepspeed_weakref(self) -> None:
        pass


def start(config: Config) -> Accelerator:
    """An Accelerator that prepares for DeepSpeed. Raises InputError where that or its JSON cannot be used."""
    sharing = read(config)
    if find_spec("deepspeed") is None:
        raise InputError("strategy = deepspeed, which is not installed here: pip install '.[deepspeed]', or take "
                         "strategy=ddp")  # fmt: skip
    if "LOCAL_RANK" not in os.environ:
        raise InputError("strategy = deepspeed needs ranks to share with: start it with torchrun, or take strategy=ddp")
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise InputError("ACCELERATE_USE_CPU is set, with which accelerate leaves DeepSpeed out: unset it (the CPU is "
                         "taken anyway where there is no GPU), or take strategy=ddp")  # fmt: skip
    _quieten()
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # for its throughput figures alone
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": sharing,
    }
    return runtime.start(config.precision, plugin=Plugin(hf_ds_config=settings | MEAN, zero3_init_flag=False))


def read(config: Config) -> dict[str, Any]:
    """zero_optimization of the JSON that the run names. Raises InputError with what in it cannot be had."""
    assert config.deepspeed is not None
    try:
        tree = json.loads(Path(config.deepspeed).read_text())
    except OSError as error:
        raise InputError(f"{config.deepspeed}: cannot read it ({error.strerror}): set deepspeed to a JSON, as "
                         "configs/deepspeed/zero2.json") from None  # fmt: skip
    except ValueError as error:
        raise InputError(f"{config.deepspeed}: not JSON: {error}") from None
    sharing = tree.get("zero_optimization") if isinstance(tree, dict) else None
    if not isinstance(sharing, dict) or sharing.get("stage") not in (1, 2, 3):
        raise InputError(f"{config.deepspeed}: zero_optimization.stage is not 1, 2 or 3: set it (0 is strategy=ddp)")
    problems = [
        f'{key}: the setting {DECIDED[key]} decides: remove it, or write "auto"'
        if key in DECIDED
        else f"{key}: not supported here: remove it"
        for key, value in tree.items()
        if key != "zero_optimization" and not (key in DECIDED and value in ("auto", {"enabled": "auto"}))
    ]
    problems += [f"zero_optimization.{key}: not supported here: remove it" for key in sharing if key not in SHARING]
    if problems:
        raise InputError("\n".join(f"{config.deepspeed}: {line}" for line in problems))
    if config.channels_last:
        raise InputError("channels_last = true, and DeepSpeed lays out weights its own way: set channels_last=false")
    if sharing["stage"] == 3 and config.ema:
        raise InputError(f"ema = {config.ema} averages whole weights at each step, and under ZeRO-3 no rank has them: "
                         "set ema=0, or a deepspeed of stage 1 or 2")  # fmt: skip
    return sharing


def _quieten() -> None:
    """DeepSpeed's log and torch's notices of what DeepSpeed calls; its errors are still told. On a CPU, take gloo's own
    collectives: DeepSpeed would compile others first."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Zero(Strategy):
    """A step's `gradient_norm` also moves the weights where the norm is finite: DeepSpeed does both at once."""

    def __init__(self, config: Config, accelerator: Accelerator, module: nn.Module) -> None:
        self.module, self.device = module, accelerator.device
        self.bare = copy.deepcopy(module).cpu()
        self.used: set[str] = set()
        plain = optimizer(config, self._groups())
        plain.register_step_pre_hook(self._leave_unused)
        if config.precision != "fp32":
            kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
            cast = torch.autocast(self.device.type, dtype=kind)(module.forward)
            module.forward = convert_outputs_to_fp32(cast)
        accelerator.gradient_accumulation_steps = config.accumulate
        self.engine, _ = accelerator.prepare(module, plain)
        self.wrapped, self.optimizer = self.engine, self.engine.optimizer.optimizer
        self.stage = self.engine.zero_optimization_stage()
        self.scale = LossScale(self.engine.optimizer) if config.precision == "fp16" else None

    def _groups(self) -> list[dict[str, Any]]:
        """A group of parameters for each child of the module: a child that no loss reached is left alone as a whole."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                child = name.partition(".")[0]
                groups.setdefault(child, []).append(parameter)
                parameter.register_post_accumulate_grad_hook(lambda _, child=child: self.used.add(child))
        self.children = list(groups)
        return [{"params": parameters, "name": child} for child, parameters in groups.items()]

    def _leave_unused(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """ZeRO fills in zeros where there is no gradient, on which momentum and weight decay would act."""
        for group in optimizer.param_groups:
            if group["name"] not in self.used:
                for part in group["params"]:
                    part.grad = None

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, total: Tensor) -> None:
        """A loss that is not finite makes the gradient so, by which DeepSpeed skips the step."""
        finite = torch.where(total.isfinite(), 1.0, torch.nan)
        self.engine.backward(loss * finite, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        """Infinite where DeepSpeed skipped the step."""
        reached = torch.tensor([child in self.used for child in self.children], dtype=torch.uint8, device=self.device)
        dist.all_reduce(reached, dist.ReduceOp.MAX)
        self.used = {child for child, any_rank in zip(self.children, reached.tolist(), strict=True) if any_rank}
        self.engine.step()
        self.used = set()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64, device=self.device)

    def step(self) -> None:
        assert self.engine.was_step_applied()
        if self.scale is not None:
            self.scale.update(kept=True)

    def discard(self) -> None:
        assert not self.engine.was_step_applied()
        if self.scale is not None:
            self.scale.update(kept=False)

    def plain(self) -> nn.Module:
        module = copy.deepcopy(self.bare).to(self.device)
        with self._gathered():
            module.load_state_dict(self.module.state_dict())
        return module

    def whole(self) -> nn.Module:
        return self.plain() if self.stage == 3 else self.module

    def load(self, weights: Tensors) -> None:
        with self._gathered(changed=True):
            self.module.load_state_dict(weights)
        self.engine.optimizer.refresh_fp32_params()

    def _gathered(self, changed: bool = False) -> AbstractContextManager[Any]:
        """Whole weights in the module; what rank 0 has changed is shared out anew."""
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            list(self.module.parameters()), modifier_rank=0 if changed else None, enabled=self.stage == 3
        )
        return context

    def pack(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """Every tensor is this rank's part; in stages 1 and 2 the parts of a group, end to end, are the group."""
        with self._listed():
            tensors, values = pack_optimizer(self.optimizer)
        scale = self.scale.state() if self.scale is not None else None
        return {}, tensors, values | {"stage": self.stage, "scaler": scale}

    def unpack(self, shared: Tensors, own: Callable[[int], Tensors], values: dict[str, Any], world_size: int) -> None:
        rank, world = runtime.rank(), runtime.world_size()
        if values["stage"] != self.stage:
            raise InputError(f"the checkpoint's optimiser is ZeRO-{values['stage']}'s and deepspeed's JSON of stage "
                             f"{self.stage}: name the JSON it was made with")  # fmt: skip
        if world_size != world and self.stage == 3:
            raise InputError(
                f"ZeRO-3 goes on with the {world_size} ranks of its checkpoint: start so many, not {world}"
            )
        with self._listed():
            if world_size == world:
                tensors = own(rank)
            else:
                sizes = [sum(part.numel() for part in group["params"]) for group in self.optimizer.param_groups]
                tensors = reshare([own(other) for other in range(world_size)], sizes, rank)
            unpack_optimizer(self.optimizer, tensors, values)
        if self.scale is not None:
            self.scale.restore(values["scaler"])

    @contextmanager
    def _listed(self) -> Iterator[None]:
        """Stage 3 keeps the optimiser's parameters out of its groups between steps."""
        if self.stage < 3:
            yield
            return
        self.engine.optimizer._set_fp32_optimizer_param_groups()
        yield
        self.engine.optimizer._clear_fp32_optimizer_param_groups()

    def held(self, weights: float, model: float, states: int) -> dict[str, float]:
        """ZeRO steps on a copy of the weights that is shared out as the states are."""
        world = runtime.world_size()
        split = {stage: world if self.stage >= stage else 1 for stage in (2, 3)}
        return {
            "model": model - weights + weights / split[3],
            "gradients": weights / split[2],
            "optimiser": (states + 1) * weights / world,
        }


def reshare(parts: list[Tensors], sizes: list[int], rank: int) -> Tensors:
    """A rank's part of optimiser states that were in `parts`, one a rank of then.

    Names are "<group>.<state>"; sizes: elements of each group's part now. End to end the parts are the group and zeros
    that fill up the last; single numbers are equal on all ranks.
    """
    shared: Tensors = {}
    for name, first in parts[0].items():
        if first.dim() == 0:
            shared[name] = first
            continue
        size = sizes[int(name.partition(".")[0])]
        group = torch.cat([part[name] for part in parts])[rank * size : (rank + 1) * size]
        shared[name] = nn.functional.pad(group, (0, size - len(group)))
    return shared


class LossScale:
    """fp16's dynamic scale: halved after a step that was not finite, doubled after DOUBLED_AFTER that were."""

    def __init__(self, zero: Any, value: float = FIRST_SCALE) -> None:
        self.zero = zero
        self.restore({"value": value, "kept": 0})

    def update(self, kept: bool) -> None:
        if not kept:
            self.restore({"value": self.value / 2, "kept": 0})
        elif self.kept + 1 == DOUBLED_AFTER:
            self.restore({"value": self.value * 2, "kept": 0})
        else:
            self.kept += 1

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "kept": self.kept}

    def restore(self, state: dict[str, Any]) -> None:
        self.value, self.kept = state["value"], state["kept"]
        self.zero.override_loss_scale(self.value)
