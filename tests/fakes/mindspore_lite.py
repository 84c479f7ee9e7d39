"""A stand-in for the Python interface of MindSpore Lite 2.7, as far as ``agent.lite_runner`` uses it.

It is written after the interface's documentation and has never been compared with Lite on a device. It is as strict as
what is documented, and where that leaves room, stricter: what passes here has the types, the order of calls and the
shapes that Lite asks for. What a graph computes is the business of ``engines``.

- Types are checked as Lite checks them: a wrong one is a ``TypeError``.
- ``ModelGroup.add_model`` comes before any of its models is built, and only what is in one group shares variables.
- A graph with variables, such as a cache, needs the provider ``ge``; those in other files are there, beside the graph.
- A graph with collectives needs a rank table.
- With ``ge``, a call has one of the shapes of ``ge.inputShape`` and ``ge.dynamicDims``. (GE is said to take others and
  compile them then, for minutes; nobody should depend on that.)
- Inputs are taken by position. An array that is not in C order is refused: what Lite makes of it is not documented.
"""

from __future__ import annotations

import logging
import os
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from engines import Engine, is_collective, open_engine
from mind_ir import mind_ir
from numpy.typing import NDArray

__version__ = "2.7.0"
KNOWN_MIND_IR_VERSION = 3  # what the real 2.7 reads is not known to us; Lite 2.0 stops at 1, with the error below

logger = logging.getLogger(__name__)


class ModelType(Enum):
    """What a model file is."""

    MINDIR = 0
    MINDIR_LITE = 4


class ModelGroupFlag(Enum):
    """What the models of a group share."""

    SHARE_WEIGHT = 1
    SHARE_WORKSPACE = 2
    SHARE_WEIGHT_WORKSPACE = 3


class DataType(Enum):
    """The type of a tensor's numbers."""

    UNKNOWN = 0
    BOOL = 30
    INT8 = 32
    INT16 = 33
    INT32 = 34
    INT64 = 35
    UINT8 = 37
    UINT16 = 38
    UINT32 = 39
    UINT64 = 40
    FLOAT16 = 42
    FLOAT32 = 43
    FLOAT64 = 44
    INVALID = 2147483647


class Format(Enum):
    """The order of a tensor's dimensions; those of images that nobody needs here are left out."""

    DEFAULT = -1
    NCHW = 0
    NHWC = 1


NUMPY_TYPES = {
    kind: np.dtype(kind.name.lower()) for kind in DataType if kind not in (DataType.UNKNOWN, DataType.INVALID)
}
TYPES_BY_NUMPY = {dtype: kind for kind, dtype in NUMPY_TYPES.items()}


def check_isinstance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {kind.__name__}, but got {type(value)}.")


class Tensor:
    """Numbers with a name."""

    def __init__(
        self,
        tensor: Tensor | NDArray[Any] | None = None,
        shape: list[int] | None = None,
        dtype: DataType | None = None,
        device: str | None = None,
    ) -> None:
        if dtype is not None:
            check_isinstance("dtype", dtype, DataType)
        if device is not None and device.split(":")[0] != "ascend":
            raise ValueError(f"device must be 'ascend' or 'ascend:N', but got {device}.")
        self.name = ""
        self.format = Format.NCHW
        if tensor is None:
            self._data = np.zeros(shape or (), NUMPY_TYPES[dtype or DataType.FLOAT32])
            self._shape = list(shape or [])
            return
        if isinstance(tensor, Tensor):
            tensor = tensor.get_data_to_numpy()
        if not isinstance(tensor, np.ndarray):
            raise TypeError(f"tensor must be MindSpore Lite's Tensor._tensor or numpy ndarray, but got {type(tensor)}.")
        if tensor.dtype not in TYPES_BY_NUMPY:
            raise TypeError(f"Unsupported numpy dtype value {tensor.dtype}")
        if not tensor.flags.c_contiguous:
            raise RuntimeError("an array that is not in C order")
        if (shape is not None and list(shape) != list(tensor.shape)) or dtype not in (
            None,
            TYPES_BY_NUMPY[tensor.dtype],
        ):
            raise TypeError(f"user set shape or dtype is not equal numpy's: {shape}, {dtype}, {tensor.shape}")
        self._data = tensor.copy()
        self._shape = list(tensor.shape)

    @property
    def dtype(self) -> DataType:
        return TYPES_BY_NUMPY[self._data.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self._shape)

    @shape.setter
    def shape(self, shape: list[int]) -> None:
        if not isinstance(shape, (list, tuple)):
            raise TypeError(f"shape must be list or tuple, but got {type(shape)}.")
        if not all(isinstance(size, int) for size in shape):
            raise TypeError("shape element must be int.")
        self._shape = list(shape)
        self._data = np.zeros([max(size, 0) for size in shape], self._data.dtype)

    @property
    def element_num(self) -> int:
        return self._data.size

    @property
    def data_size(self) -> int:
        return self._data.nbytes

    def get_data_to_numpy(self) -> NDArray[Any]:
        return self._data.copy()

    def set_data_from_numpy(self, numpy_obj: NDArray[Any]) -> None:
        check_isinstance("numpy_obj", numpy_obj, np.ndarray)
        if TYPES_BY_NUMPY.get(numpy_obj.dtype) is not self.dtype:
            raise RuntimeError(f"data type not equal! Numpy type: {numpy_obj.dtype}, Tensor type: {self.dtype}")
        if numpy_obj.nbytes != self.data_size:
            raise RuntimeError(f"data size not equal! Numpy size: {numpy_obj.nbytes}, Tensor size: {self.data_size}")
        self._data = numpy_obj.reshape(self._shape).copy()


class TensorMeta:
    """What is known of an output before it is there."""

    def __init__(self, name: str, dtype: DataType, shape: list[int]) -> None:
        self.name, self.dtype, self.shape, self.format = name, dtype, shape, Format.DEFAULT


class _Ascend:
    """The Ascend half of a context."""

    def __init__(self) -> None:
        self._device_id, self._rank_id, self._provider = 0, 0, ""

    @property
    def device_id(self) -> int:
        return self._device_id

    @device_id.setter
    def device_id(self, value: int) -> None:
        self._device_id = _number("ascend_device_id", value)

    @property
    def rank_id(self) -> int:
        return self._rank_id

    @rank_id.setter
    def rank_id(self, value: int) -> None:
        self._rank_id = _number("ascend_rank_id", value)

    @property
    def provider(self) -> str:
        return self._provider

    @provider.setter
    def provider(self, value: str) -> None:
        check_isinstance("ascend_provider", value, str)
        self._provider = value


def _number(name: str, value: int) -> int:
    check_isinstance(name, value, int)
    if value < 0:
        raise ValueError(f"{name} must be a non-negative int.")
    return value


class Context:
    """Where models run."""

    def __init__(self) -> None:
        self.ascend = _Ascend()
        self._target = ["cpu"]

    @property
    def target(self) -> list[str]:
        return self._target

    @target.setter
    def target(self, target: list[str]) -> None:
        check_isinstance("target", target, list)
        for one in target:
            check_isinstance("target element", one, str)
            if one.lower() not in ("cpu", "gpu", "ascend"):
                raise ValueError(f"target elements must be in ['cpu', 'gpu', 'ascend'], but got {one.lower()}.")
        self._target = target


class Model:
    """One graph."""

    def __init__(self) -> None:
        self._graph: Any = None
        self._gears: list[dict[str, list[int]]] = []
        self._engine: Engine | None = None
        self._variables: dict[str, Any] = {}  # of its group, if it is in one

    def build_from_file(
        self,
        model_path: str,
        model_type: ModelType,
        context: Context | None = None,
        config_path: str = "",
        config_dict: dict[str, dict[str, str]] | None = None,
    ) -> None:
        check_isinstance("model_path", model_path, str)
        check_isinstance("model_type", model_type, ModelType)
        context = context or Context()
        check_isinstance("context", context, Context)
        check_isinstance("config_path", config_path, str)
        if not os.path.exists(model_path):
            raise RuntimeError("build_from_file failed, model_path does not exist!")
        if config_path and not os.path.exists(config_path):
            raise RuntimeError("build_from_file failed, config_path does not exist!")
        config = _read_config(Path(config_path)) if config_path else {}
        for section, options in (config_dict or {}).items():
            check_isinstance("config_dict_value", options, dict)
            for key, value in options.items():
                check_isinstance("config_dict_value_key", key, str)
                check_isinstance("config_dict_value_value", value, str)
            config[section] = config.get(section, {}) | options
        self._build(Path(model_path), context, config)

    def _build(self, path: Path, context: Context, config: dict[str, dict[str, str]]) -> None:
        model = mind_ir.ModelProto()
        model.ParseFromString(path.read_bytes())
        if model.mind_ir_version > KNOWN_MIND_IR_VERSION:
            raise RuntimeError(
                "build_from_file failed! Error is Common error code. (can only support the maximum mind ir version: "
                f"{KNOWN_MIND_IR_VERSION})"
            )
        if model.graph.parameter and ("Ascend" not in context.target or context.ascend.provider != "ge"):
            raise RuntimeError("build_from_file failed! A model with variables needs Ascend and the provider ge")
        table = config.get("ascend_context", {}).get("rank_table_file")
        if table is not None and not os.path.exists(table):
            raise RuntimeError(f"build_from_file failed! rank_table_file {table} does not exist")
        if table is None and any(map(is_collective, model.graph.node)):
            raise RuntimeError("build_from_file failed! A graph with collectives needs a rank_table_file")
        for parameter in model.graph.parameter:
            location = parameter.external_data.location
            if location and not (path.parent / location).is_file():
                raise RuntimeError(f"build_from_file failed! {location} is not beside {path}")
        options = config.get("ge_graph_options", {})
        self._graph = model.graph
        self._gears = _gears(options.get("ge.inputShape", ""), options.get("ge.dynamicDims", ""))
        if any(gear.keys() != {_plain(entry.name) for entry in model.graph.input} for gear in self._gears):
            raise RuntimeError("build_from_file failed! ge.inputShape does not name the inputs of the graph")
        if any(-1 in entry.tensor[0].dims for entry in model.graph.input) and not self._gears:
            raise RuntimeError("build_from_file failed! The graph has open dimensions, and there is no ge.inputShape")
        self._engine = open_engine(path, model.graph, self._variables)
        logger.info(
            "built %s for device %d, rank %d: %s", path, context.ascend.device_id, context.ascend.rank_id, config
        )

    @property
    def built(self) -> bool:
        return self._engine is not None

    def get_inputs(self) -> list[Tensor]:
        self._check_built()
        tensors = []
        for entry in self._graph.input:
            tensor = Tensor(dtype=_data_type(entry.tensor[0].data_type))
            tensor.name, tensor.shape = _plain(entry.name), list(entry.tensor[0].dims)
            tensors.append(tensor)
        return tensors

    def get_outputs(self) -> list[TensorMeta]:
        self._check_built()
        return [TensorMeta("logits", DataType.FLOAT32, [-1, -1])]

    def resize(self, inputs: list[Tensor], dims: list[list[int]]) -> None:
        """With ge, the shape of an input is what its tensor has; so this sets only that."""
        self._check_built()
        for name, value in (("inputs", inputs), ("dims", dims)):
            check_isinstance(name, value, list)
        if len(inputs) != len(dims):
            raise ValueError("The size of inputs is not equal to the size of dims.")
        self._check_gear({tensor.name: shape for tensor, shape in zip(inputs, dims, strict=True)})
        for tensor, shape in zip(inputs, dims, strict=True):
            tensor.shape = shape

    def predict(self, inputs: list[Tensor], outputs: list[Tensor] | None = None) -> list[Tensor]:
        if not isinstance(inputs, (list, tuple)):
            raise TypeError(f"inputs must be list or tuple, but got {type(inputs)}.")
        if outputs is not None:
            raise TypeError("this stand-in makes its outputs itself")
        wanted = self.get_inputs()
        if len(wanted) != len(inputs):
            raise RuntimeError(f"model input len:{len(wanted)} not equal input len:{len(inputs)}!")
        for ours, theirs in zip(wanted, inputs, strict=True):
            if not isinstance(theirs, Tensor):
                raise TypeError("inputs element must be Tensor, of numpy.")
            if ours.dtype is not theirs.dtype:
                raise RuntimeError(f"predict failed! {ours.name} is {ours.dtype}, and {theirs.dtype} came")
        self._check_gear({ours.name: theirs.shape for ours, theirs in zip(wanted, inputs, strict=True)})
        arrays = {ours.name: theirs.get_data_to_numpy() for ours, theirs in zip(wanted, inputs, strict=True)}
        assert self._engine is not None
        return [Tensor(output) for output in self._engine(arrays)]

    def _check_gear(self, shapes: dict[str, list[int]]) -> None:
        allowed = self._gears or [{_plain(entry.name): list(entry.tensor[0].dims) for entry in self._graph.input}]
        if shapes not in allowed:
            raise RuntimeError(f"predict failed! {shapes} is none of the shapes that the graph was compiled for")

    def _check_built(self) -> None:
        if not self.built:
            raise RuntimeError("the model is not built")


class ModelGroup:
    """Models that share memory."""

    def __init__(self, flags: ModelGroupFlag = ModelGroupFlag.SHARE_WORKSPACE) -> None:
        check_isinstance("flags", flags, ModelGroupFlag)
        self._flags = flags

    def add_model(self, models: list[Model]) -> None:
        if not isinstance(models, (list, tuple)):
            raise TypeError(f"models must be list/tuple, but got {type(models)}")
        if not models:
            raise RuntimeError("models cannot be empty")
        shared: dict[str, Any] = {}
        for model in models:
            if not isinstance(model, Model):
                raise TypeError(f"models element must be all str or Model, but got {type(model)}.")
            if model.built:
                raise RuntimeError("ModelGroup's add model failed: it is built already")
            if self._flags is not ModelGroupFlag.SHARE_WORKSPACE:
                model._variables = shared


def _read_config(path: Path) -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line:
            key, equals, value = line.partition("=")
            if not equals:
                raise RuntimeError(f"load configuration failed! Error is {line}")
            section[key.strip()] = value.strip()
    return sections


def _gears(input_shape: str, dynamic_dims: str) -> list[dict[str, list[int]]]:
    """The shapes that are compiled, by input."""
    shapes = {}
    for part in filter(None, input_shape.split(";")):
        name, _, sizes = part.partition(":")
        shapes[name] = [int(size) for size in sizes.split(",")]
    gears = []
    for group in dynamic_dims.split(";"):
        numbers = iter([int(number) for number in group.split(",") if number])
        gears.append(
            {name: [next(numbers) if size == -1 else size for size in sizes] for name, sizes in shapes.items()}
        )
        if next(numbers, None) is not None:
            raise RuntimeError("build_from_file failed! ge.dynamicDims has more numbers than ge.inputShape has -1")
    return gears if shapes else []


def _data_type(number: int) -> DataType:
    name: str = mind_ir.TensorProto.DataType.Name(number)
    return DataType[{"FLOAT": "FLOAT32"}.get(name, name)]


def _plain(name: str) -> str:
    return name.rpartition(":")[2]
