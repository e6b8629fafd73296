"""Every setting: typed, documented, validated. YAML plus `key=value`; nothing reads a raw dict after `load`."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cclmpc_dist.errors import InputError
from cclmpc_dist.explain import explain, repeated, without

PositiveInt = Annotated[int, Field(gt=0, strict=True)]  # strict: neither 2.0 nor true counts things
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """A frozen section. A field's description is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _fraction(default: float, text: str) -> Any:
    return Field(default, ge=0, le=1, description=text)


class Further(Settings):
    """A corpus beside `data.path`: its training cases are unlabelled, whether or not its shards hold labels."""

    path: str = Field(description="its folder or URL, as data.path")
    batch: PositiveInt = Field(description="its images of data.batch_unlabelled; what the corpora leave over is "
                               "data.path's")  # fmt: skip


CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]


class Data(Settings):
    path: str = Field(description="folder that `cclmpc shard` wrote, or its URL: http://, https:// or s3:// "
                      "(docs/stores.md)")  # fmt: skip
    further: dict[CorpusName, Further] = Field({}, description="more corpora of unlabelled images, each under a NAME "
                                               "of yours (docs/data.md)")  # fmt: skip
    cache: str | None = Field(None, description="folder on a disk of the node for shards of a URL, shared by its ranks "
                              "and by other runs; must be set for a URL, a folder needs none")  # fmt: skip
    cache_gib: PositiveFloat = Field(32.0, description="size of the cache in GiB; the blocks in use, one a lane, may "
                                     "come to it")  # fmt: skip
    labelled: Annotated[int, Field(gt=0, strict=True)] | list[str] | None = Field(
        None, description="labelled training cases: first N, or keys; unset takes what the shards say"
    )
    select: NonNegativeInt = Field(0, description="labelled cases set aside to choose the best checkpoint on")
    patch: tuple[PositiveInt, ...] = Field(description="crop size in voxels, one number an axis")
    batch_labelled: PositiveInt | None = Field(None, description="labelled images a microbatch over ALL ranks; "
                                               "unset takes max(2, ranks)")  # fmt: skip
    batch_unlabelled: PositiveInt | None = Field(None, description="unlabelled images a microbatch over ALL ranks and "
                                                 "corpora; unset takes max(2, ranks)")  # fmt: skip
    oversample_foreground: float = _fraction(0.0, "share of labelled crops that are placed on a foreground voxel")
    rotate: bool = Field(True, description="random quarter turns in the first two axes")
    flip: tuple[NonNegativeInt, ...] = Field((0, 1), description="axes flipped at random")
    workers: NonNegativeInt = Field(
        0, description="threads a stream and rank that read batches ahead; 0 reads between steps"
    )
    block: PositiveInt = Field(16, description="shards shuffled together; a rank reads about this many at once")
    on_error: Literal["fail", "skip"] = Field("fail", description="an unreadable sample stops the run, or is replaced "
                                              "by its lane's next one and counted")  # fmt: skip

    @property
    def paths(self) -> dict[str, str]:
        """Where each corpus lies, by the key of the setting: data.path, then data.further in the order of its names."""
        further = {f"data.further.{name}.path": self.further[name].path for name in sorted(self.further)}
        return {"data.path": self.path} | further

    @property
    def remote(self) -> bool:
        return any("://" in path for path in self.paths.values())


class Views(Settings):
    """Intensity views [P]; the 3D set of operations and its strengths are [F]."""

    probability: float = _fraction(0.8, "chance that an operation is applied to a view")
    brightness: NonNegativeFloat = Field(0.4, description="added: uniform in +-brightness standard deviations")
    contrast: float = _fraction(0.4, "factor about the mean: uniform in 1 +- contrast")
    gamma: float = _fraction(0.3, "exponent exp(u), u uniform in +-gamma, on the intensities scaled to [0, 1]")
    noise: NonNegativeFloat = Field(
        0.1, description="Gaussian noise: standard deviation uniform in [0, noise] of the image's own"
    )
    blur: NonNegativeFloat = Field(1.0, description="Gaussian blur: sigma uniform in [0, blur] voxels")


class Swin(Settings):
    """The Transformer decoder: Swin blocks at strides 16, 8 and 4 [F]."""

    depth: PositiveInt = Field(2, description="blocks a stage; every second one shifts its windows")
    window: tuple[PositiveInt, ...] = Field((7, 7, 5), description="attention window in positions, one number an axis")
    head_width: PositiveInt = Field(16, description="channels of one attention head")


class Model(Settings):
    filters: PositiveInt = Field(16, description="V-Net channels at full resolution; they double at each of 4 halvings")
    norm: Literal["batch", "instance", "group", "sync_batch"] = Field("batch", description="normalisation layers")
    dropout: float = _fraction(0.5, "whole-channel dropout at the bottom and before the last layer")
    recompute: tuple[Literal[1, 2, 4, 8, 16], ...] = Field(
        (), description="strides of the stages, of encoder and decoders alike, whose activations backward computes "
        "anew: less memory, more time, the same numbers (docs/training.md)"
    )  # fmt: skip
    swin: Swin = Swin()
    projection: PositiveInt = Field(128, description="width of the SBCL projection [F]")
    embedding: PositiveInt = Field(256, description="width of the CGCL embedding [P]")


class Contrast(Settings):
    temperature: PositiveFloat = Field(0.07, description="tau [P]")
    n_sbcl: PositiveInt = Field(256, description="SBCL positions an image, the same in both views [F]")
    n_negatives: PositiveInt = Field(256, description="SBCL negatives taken from each original image [F]")
    negatives: Literal["all", "other_class"] = Field("all", description="other_class drops negatives whose certain "
                                                     "class is the anchor's [F]")  # fmt: skip
    n_cgcl: PositiveInt = Field(64, description="CGCL anchors an image and class, half of them hard [F]")
    keys: Literal["live", "detached"] = Field("live", description="detached stops the gradient of all keys, this "
                                              "rank's too; the originals then run without gradient")  # fmt: skip
    bank: NonNegativeInt = Field(1024, description="bank keys a class, at least what a step offers: images times "
                                 "(bank_offer + 1); 0 switches the bank off [F]")  # fmt: skip
    bank_layout: Literal["replicated", "sharded"] = Field(
        "replicated", description="all ranks hold the same bank, or each rank `bank` keys a class of its own images"
    )
    bank_offer: PositiveInt = Field(16, description="keys an image and class offered to the bank each step, with the "
                                    "class mean besides [F]")  # fmt: skip
    exchange: Literal["auto", "naive", "keys", "anchors"] = Field(
        "auto",
        description="what travels between ranks, same numbers all: keys, anchors, or keys with all logits built "
        "(naive); auto takes what receives fewer bytes (docs/exchange.md)",
    )
    group: PositiveInt | None = Field(None, description="neighbouring ranks that share keys; unset is all")
    tile: PositiveInt = Field(1024, description="keys visited at a time by the streaming loss, on a GPU at least")


class CCLMPC(Settings):
    views: Views = Views()
    contrast: Contrast = Contrast()
    swin_weight: NonNegativeFloat = Field(0.4, description="weight of the Swin decoder's supervised loss [F]")
    lambda_con: NonNegativeFloat = Field(0.1, description="weight of l_hdc + l_cp + l_av")
    lambda_sbcl: NonNegativeFloat = Field(0.1, description="weight of SBCL")
    lambda_cgcl: NonNegativeFloat = Field(0.1, description="weight of CGCL")
    t_ramp: float = Field(0.4, gt=0, le=1, description="share of the steps over which consistency ramps up [F]")
    t_contrast: float = _fraction(0.1, "share of the steps before the contrast starts [F]")
    gamma_start: float = _fraction(0.75, "normalised entropy below which a pixel is certain, at the start [F]")
    gamma_end: float = _fraction(0.95, "the same at the end [F]")
    predictor: Literal["conv", "mean"] = Field("conv", description="answer of the convolutional decoder, or the mean "
                                               "of both")  # fmt: skip


class Optim(Settings):
    name: Literal["sgd", "adamw"] = Field("sgd", description="optimiser")
    lr: PositiveFloat = Field(0.01, description="learning rate at the start")
    momentum: float = _fraction(0.9, "SGD momentum")
    weight_decay: NonNegativeFloat = Field(1e-4, description="L2 term of SGD, decoupled in AdamW")
    clip: NonNegativeFloat = Field(0.0, description="largest gradient norm; 0 does not clip")
    schedule: Literal["poly", "constant"] = Field("poly", description="course of the learning rate over a phase")
    power: PositiveFloat = Field(0.9, description="poly: lr (1 - t/T)^power")
    warmup: NonNegativeInt = Field(0, description="steps of linear warm-up")
    lr_rule: Literal["none", "linear", "sqrt"] = Field(
        "none", description="scale lr with the global batch over lr_batch"
    )
    lr_batch: PositiveInt = Field(4, description="global batch (labelled + unlabelled) that lr is meant for")


class Budget(Settings):
    """Length of training, exactly one of the two."""

    images: PositiveInt | None = Field(None, description="images seen, labelled + unlabelled, over all ranks")
    epochs: PositiveInt | None = Field(None, description="passes over the unlabelled stream (labelled where alone); of "
                                       "several corpora over the one that needs the most steps")  # fmt: skip


class Checkpoints(Settings):
    every_steps: NonNegativeInt = Field(500, description="0 saves at the end only")
    every_minutes: NonNegativeFloat = Field(30.0, description="0 counts no minutes")
    keep: PositiveInt = Field(2, description="newest checkpoints kept; the best on data.select is kept besides")


class Evaluation(Settings):
    stride: tuple[PositiveInt, ...] | None = Field(None, description="sliding-window stride; unset is half the patch")
    blend: Literal["uniform", "gaussian"] = Field("uniform", description="weights of overlapping windows")
    batch: PositiveInt = Field(4, description="windows a forward pass")
    every_steps: NonNegativeInt = Field(0, description="validate on data.select every N steps; 0 never")


class Profile(Settings):
    """A look at a few steps, into RUN/profile; weights do not depend on it."""

    trace: bool = Field(False, description="torch.profiler's trace of some steps, of every rank, and rank 0's table of "
                        "operators (docs/training.md)")  # fmt: skip
    memory: bool = Field(False, description="on a GPU torch's memory snapshot after those steps, and where memory runs "
                         "out; on a CPU, for which there is none, allocations in trace and table")  # fmt: skip
    after: PositiveInt = Field(10, description="steps of this process before them, the last one warms the profiler up")
    steps: PositiveInt = Field(3, description="how many steps")


class Config(Settings):
    name: str = Field(description="the run's folder is runs/<name>", pattern=r"^\w[\w.\-]*$")
    runs: str = Field("runs", description="where run folders lie")
    seed: NonNegativeInt = Field(1337, description="of the initial weights and of every draw")
    method: Literal["ccl_mpc", "supervised"] = Field("ccl_mpc", description="what is trained")
    data: Data
    model: Model = Model()
    ccl_mpc: CCLMPC = CCLMPC()
    optim: Optim = Optim()
    budget: Budget
    accumulate: PositiveInt = Field(1, description="microbatches an optimiser step; losses are those of a microbatch")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="fp32, or the autocast type")
    channels_last: bool = Field(False, description="channels-last memory layout")
    strategy: Literal["ddp", "deepspeed"] = Field("ddp", description="how the ranks share the work: whole copies, or "
                                                  "DeepSpeed's ZeRO, which splits optimiser states")  # fmt: skip
    deepspeed: str | None = Field(None, description="DeepSpeed's JSON, as configs/deepspeed/zero2.json; read by "
                                  "strategy: deepspeed alone")  # fmt: skip
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights that evaluation uses; 0 is off")
    checkpoint: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    profile: Profile = Profile()
    log_every: PositiveInt = Field(10, description="steps a log line stands for")
    hang_seconds: NonNegativeFloat = Field(
        120.0,
        description="a step, after the first, that stands still this long ends its ranks with code 1 and names those "
        "that did not come (docs/reliability.md); 0 leaves it to the process group's ten minutes",
    )

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def dims(self) -> int:
        return len(self.data.patch)

    @property
    def stride(self) -> tuple[int, ...]:
        return self.evaluation.stride or tuple(max(1, size // 2) for size in self.data.patch)

    def batch(self, stream: str, world_size: int) -> int:
        """Global batch of a stream ("labelled" or "unlabelled")."""
        size = self.data.batch_labelled if stream == "labelled" else self.data.batch_unlabelled
        return size or max(2, world_size)

    def lanes(self, world_size: int) -> list[int]:
        """G_k of the unlabelled stream: what is left to data.path, then data.further in the order of its names."""
        further = [self.data.further[name].batch for name in sorted(self.data.further)]
        return [self.batch("unlabelled", world_size) - sum(further), *further]


MODEL_STRIDE = 16  # the V-Net halves four times


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `dotted.key=value` overrides.

    Raises InputError with every problem at once, each naming its key.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration ({error.strerror}): name a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text: name a YAML file") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    twice = [f"{path}: {line}" for line in repeated(yaml.compose(text, yaml.SafeLoader))]
    if twice:
        raise InputError("\n".join(twice))
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds no settings: write `key: value` lines, as configs/demo.yaml does")
    for item in overrides:
        _override(raw, item)
    return parse(raw, str(path), [item.partition("=")[0] for item in overrides])


def parse(raw: dict[str, Any], where: str, given: Sequence[str] = ()) -> Config:
    """A validated Config from a raw tree; `where` names it in errors, but for the keys `given` on the command line."""
    wrong: list[str] = []  # keys
    try:
        config, problems = Config.model_validate(raw), []
    except ValidationError as error:
        problems = list(dict.fromkeys(explain(item, raw, Config) for item in error.errors()))
        wrong = [".".join(str(part) for part in item["loc"]) for item in error.errors()]
        try:  # combinations of what is left are told in the same breath
            config = Config.model_validate(without(raw, [item["loc"] for item in error.errors()]))
        except ValidationError:
            raise InputError(_placed(problems, where, given)) from None
    told = [re.compile(rf"(?<![\w.]){re.escape(key)}(?![\w.])") for key in wrong]
    problems += [line for line in combinations(config) if not any(key.search(line) for key in told)]
    if problems:
        raise InputError(_placed(problems, where, given))
    return config


def _placed(problems: Sequence[str], where: str, given: Sequence[str]) -> str:
    """Each problem after its place: the command line where that gave the setting which the line begins with."""
    lines = []
    for line in problems:
        setting = re.split(r"[^\w.]", line)[0] + "."
        ours = any(f"{key}.".startswith(setting) or setting.startswith(f"{key}.") for key in given)
        lines.append(f"{'command line' if ours else where}: {line}")
    return "\n".join(lines)


def combinations(config: Config) -> list[str]:
    """What each setting allows and all together do not. One line a problem."""
    problems = [line for key, path in config.data.paths.items() for line in _store(config.data, key, path)]
    dims = config.dims
    if dims not in (2, 3):
        problems.append(f"data.patch has {dims} numbers: give 2 or 3, one an axis")
    for axis, size in enumerate(config.data.patch):
        if size % MODEL_STRIDE:
            near = max(MODEL_STRIDE, round(size / MODEL_STRIDE) * MODEL_STRIDE)
            problems.append(f"data.patch[{axis}] = {size} is no multiple of the network's {MODEL_STRIDE}: take {near}")
    if config.model.norm == "instance" and max(config.data.patch) == MODEL_STRIDE:
        problems.append(f"data.patch = {list(config.data.patch)} leaves one position at the network's bottom, which "
                        "norm: instance cannot normalise: take 32 along an axis, or norm: group")  # fmt: skip
    for key, value in {"evaluation.stride": config.stride, "model.swin.window": config.model.swin.window}.items():
        if len(value) != dims:
            problems.append(f"{key} has {len(value)} numbers and data.patch {dims}: give one an axis")
    for axis, (step, size) in enumerate(zip(config.stride, config.data.patch, strict=False)):
        if step > size:
            problems.append(
                f"evaluation.stride[{axis}] = {step} is larger than the patch's {size}: voxels would be missed; "
                "take at most that, or null for half the patch"
            )
    for axis in config.data.flip:
        if axis >= dims:
            problems.append(f"data.flip names axis {axis} of {dims}: axes count from 0")
    if len(set(config.data.flip)) < len(config.data.flip):
        problems.append(f"data.flip = {list(config.data.flip)} names an axis twice: name each once")
    if (config.budget.images is None) == (config.budget.epochs is None):
        problems.append("budget needs exactly one of budget.images and budget.epochs: set one, and the other to null")
    if config.evaluation.every_steps and not config.data.select:
        problems.append("evaluation.every_steps needs validation cases: set data.select to a number of labelled cases, "
                        "or evaluation.every_steps to 0")  # fmt: skip
    if config.strategy == "deepspeed" and config.deepspeed is None:
        problems.append("strategy = deepspeed needs its JSON: set deepspeed=configs/deepspeed/zero2.json")
    contrast = config.ccl_mpc.contrast
    sharded = config.ccl_mpc.lambda_cgcl and contrast.bank and contrast.bank_layout == "sharded"
    if sharded and contrast.exchange not in ("auto", "anchors"):
        problems.append(f"ccl_mpc.contrast.exchange = {contrast.exchange} does not reach the keys of a sharded bank: "
                        "take auto or anchors, or bank_layout: replicated")  # fmt: skip
    narrowest = config.model.filters * 4  # channels of the Swin decoder's last stage
    if narrowest % config.model.swin.head_width:
        problems.append(f"model.swin.head_width = {config.model.swin.head_width} does not divide the Swin decoder's "
                        f"{narrowest} channels: take {math.gcd(narrowest, 16)}")  # fmt: skip
    return problems


def _store(data: Data, key: str, path: str) -> list[str]:
    if "://" not in path:
        return []
    problems = [f"{key} {problem}" for problem in url_problems(path)]
    if data.cache is None:
        problems.append(f"data.cache is not set: a URL ({key}) needs a folder on a disk of the node to keep shards in")
    return problems


def url_problems(url: str) -> list[str]:
    """What is wrong with a corpus's URL, without telling it: it may hold a password."""
    problems = []
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    if scheme not in ("http", "https", "s3") or not host:
        problems.append("is no URL that is known: give a folder, http(s)://HOST/FOLDER or s3://BUCKET/FOLDER")
    if set("@?#") & set(rest):
        problems.append("holds @, ? or #, as URLs with a password do, which logs and config.yaml would keep: leave it "
                        "out, and give credentials in the environment (docs/stores.md)")  # fmt: skip
    return problems


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise InputError(f"{item!r}: overrides are written key=value, as in optim.lr=0.01")
    node = raw
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise InputError(f"{item!r}: {part} is a value, not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"{item!r}: the value is not YAML") from None
