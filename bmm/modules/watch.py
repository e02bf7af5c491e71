"""Seeing every product of rows with a parameter, at the level of operators: no module type is missed.

A forward hook on `torch.nn.Linear` misses transposed weights (GPT-2's `Conv1D`), fused projections
(`in_proj_weight` of `MultiheadAttention`, whose output projection never fires its hook), stacks of experts
(`(experts, out, in)` tensors) and patch convolutions. Here a `TorchDispatchMode` looks at the operators that a forward
pass really runs, and recognises a parameter, or a part of one, by the memory that it lies in.

What is seen: which parameter was multiplied (`Site`), the rows that it read, what it answered, and where the answer
was added to a stream. What to make of it is the caller's (`bmm.modules.linear`, `bmm.grams.collect`,
`bmm.regression.propagate`).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bmm.modules.tokens import Routed, Tokens

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.linear.default: (0, 1, 2, False),
    _aten.addmm.default: (1, 2, 0, True),
    _aten.mm.default: (0, 1, None, True),
    _aten.matmul.default: (0, 1, None, True),
}
"""Operator -> places of rows, weight and bias among its arguments, and whether the weight is given as `(in, out)`."""
_CONVOLUTIONS = frozenset({_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default})
_ADDITIONS = frozenset({_aten.add.Tensor, _aten.add_.Tensor})


class Reached(Exception):  # noqa: N818 - not an error: the pass has shown what was wanted
    """Ends a forward pass early."""


@dataclass(frozen=True)
class Site:
    """A matrix `(out, in)` inside a parameter.

    Attributes:
        weight: name of the parameter.
        transposed: the parameter holds it as `(in, out)`.
        index: its place in a stack of matrices, or None.
        rows: first and last (exclusive) row of the parameter, where only a part of it is the matrix; else None.
    """

    weight: str
    transposed: bool = False
    index: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Product:
    """One multiplication: `rows` `(rows, in)` of what reached the matrix at `site`.

    `bias` is the name of the parameter that was added at once, `keep` the indices of rows that count (None: all),
    `identity` equal for products that read the very same tensor.
    """

    site: Site
    bias: str | None
    rows: Tensor
    keep: Tensor | None
    identity: tuple[int, ...]

    def kept(self, tensor: Tensor) -> Tensor:
        """Return those rows `(rows, width)` of an input or output of this product that count."""
        return tensor if self.keep is None else tensor[self.keep]


@dataclass(frozen=True)
class Addition:
    """An answer that was added to a stream which was there before it.

    `stream` and `total` are what it was added to and the sum, `(rows, out)` in the order of the product's rows; `scale`
    is the name of the parameter that the answer was multiplied with before, channel by channel, or None.
    """

    site: Site
    stream: Tensor
    scale: str | None
    total: Tensor


class Observer:
    """Who is told of what a watch sees; each method may raise `Reached` to end the pass.

    Attributes:
        of_shapes_alone: what a product answers does not matter: it is zeros of its shape, and its weight is not read.
    """

    of_shapes_alone: ClassVar[bool] = False

    def read(self, product: Product) -> None:
        """Take note of a product before it is computed."""

    def answered(self, product: Product, output: Tensor) -> None:
        """Take note of what a product gave, `(rows, out)`."""

    def added(self, addition: Addition) -> None:
        """Take note of an answer that went into a stream."""

    def embedded(self, weight: str) -> None:
        """Take note of a parameter that is looked up as a table."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which the forward passes of one encoder are seen.

    Args:
        encoder: the module whose parameters are recognised, by canonical name.
        observer: who is told.
        tokens: which rows of the first pass's products count; without, all.
    """

    def __init__(self, encoder: nn.Module, observer: Observer, tokens: Tokens | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._encoder = encoder
        self._observer = observer
        self._parameters = {
            parameter.untyped_storage().data_ptr(): (name, parameter) for name, parameter in encoder.named_parameters()
        }
        self._token_first = {
            f"{name}.{leaf}" if name else leaf
            for name, module in encoder.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for leaf, _ in module.named_parameters()
        }
        self._settings = ExitStack()
        self.begin(tokens or Tokens({}))

    def begin(self, tokens: Tokens) -> None:
        """Begin another forward pass."""
        self._tokens = tokens
        self._clock = 0
        # By memory: when it was given to a tensor, when it was last written to in place, and whose answer it holds.
        self._made: dict[int, int] = {}
        self._changed: dict[int, int] = {}
        self._answers: dict[int, _Answer] = {}
        self._routed: Routed | None = None

    def __enter__(self) -> Watch:
        """Begin to watch; fused fast paths, which hide the parameters, are off meanwhile."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._settings.callback(torch.backends.mha.set_fastpath_enabled, fast)
        configs = {
            id(config): config
            for module in self._encoder.modules()
            if (config := getattr(module, "config", None)) is not None and hasattr(config, "_experts_implementation")
        }
        for config in configs.values():
            # One product for each expert instead of one for all of them, which no library could take apart again.
            chosen = config._experts_implementation
            config._experts_implementation = "eager"
            self._settings.callback(setattr, config, "_experts_implementation", chosen)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """End, with everything as it was before."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._settings.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one operator, and run it."""
        kwargs = kwargs or {}
        self._clock += 1
        product = self._product(func, args, kwargs)
        if product is not None:
            self._observer.read(product)
        before = args[0].clone() if func is _aten.add_.Tensor and self._is_answer(args[1]) else None
        blank = product is not None and self._observer.of_shapes_alone
        output = _blank(func, args, kwargs) if blank else func(*args, **kwargs)
        answers = self._answers.copy() if func is _aten.add_.Tensor else self._answers
        self._date(func, args, output)
        if product is not None:
            self._after(product, output)
        elif func in _ADDITIONS:
            self._addition(answers, args, before, output)
        elif func is _aten.mul.Tensor:
            self._scaling(args, output)
        elif func is _aten.index.Tensor:
            self._selection(args)
        elif func is _aten.embedding.default and (found := self._parameters.get(_memory(args[0]))):
            self._observer.embedded(found[0])
        return output

    def _date(self, func: Any, args: tuple[Any, ...], output: Any) -> None:
        """Remember when memory was given or changed: it is given again once its tensor is gone."""
        given = {_memory(value) for value in args if isinstance(value, Tensor)}
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if not isinstance(tensor, Tensor):
                continue
            memory = _memory(tensor)
            if memory not in given:
                self._made[memory] = self._clock
                self._changed.pop(memory, None)
                self._answers.pop(memory, None)
            elif func._schema.is_mutable:
                self._changed[memory] = self._clock
                self._answers.pop(memory, None)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        if func in _CONVOLUTIONS:
            return self._convolution(func, args, kwargs)
        places = _PRODUCTS.get(func)
        if places is None:
            return None
        rows_place, weight_place, bias_place, by_columns = places
        weight = args[weight_place]
        if weight.ndim != 2 or (found := self._parameters.get(_memory(weight))) is None:
            return None
        site = _site(*found, weight.T if by_columns else weight)
        if site is None:
            return None
        given = None if bias_place is None or len(args) <= bias_place else args[bias_place]
        if given is None:
            given = kwargs.get("bias")
        tensor = args[rows_place]
        rows = tensor.reshape(-1, tensor.shape[-1])
        memory = _memory(tensor)
        identity = (
            memory,
            tensor.storage_offset(),
            tensor.numel(),
            self._made.get(memory, 0),
            self._changed.get(memory, 0),
        )
        routed = self._routed if site.index is not None else None
        keep = self._tokens.kept(tensor, token_first=site.weight in self._token_first, routed=routed)
        return Product(site, self._bias(given, site), rows, keep, identity)

    def _convolution(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        """A convolution whose patches do not overlap is a linear map of the patches."""
        images, weight = args[0], args[1]
        found = self._parameters.get(_memory(weight))
        arguments = dict(zip(("bias", "stride", "padding", "dilation", "groups"), args[2:], strict=False)) | kwargs
        kernel = tuple(weight.shape[2:])
        apart = tuple(arguments.get("stride", (1,))) == kernel and any(size > 1 for size in kernel)
        plain = not any(arguments.get("padding", [0])) and arguments.get("groups", 1) == 1
        if found is None or not apart or not plain or func is not _aten.conv2d.default:
            return None
        if weight.numel() != found[1].numel():
            return None
        patches = nn.functional.unfold(images, kernel, stride=kernel).transpose(1, 2)
        site, keep = Site(found[0]), self._tokens.kept(patches)
        identity = (_memory(images), images.storage_offset(), images.numel(), 0)
        rows = patches.reshape(-1, patches.shape[-1])
        return Product(site, self._bias(arguments.get("bias"), site), rows, keep, identity)

    def _bias(self, given: Tensor | None, site: Site) -> str | None:
        if given is None or (found := self._parameters.get(_memory(given))) is None:
            return None
        start = 0 if site.rows is None else site.rows[0]
        return found[0] if site.index is None and given.ndim == 1 and given.storage_offset() == start else None

    def _after(self, product: Product, output: Tensor) -> None:
        self._answers[_memory(output)] = _Answer(product.site, self._clock, None)
        rows = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
        self._observer.answered(product, rows.reshape(-1, rows.shape[-1]))

    def _is_answer(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _memory(value) in self._answers

    def _scaling(self, args: tuple[Any, ...], output: Tensor) -> None:
        for value, scale in (args[:2], args[1::-1]):
            if self._is_answer(value) and isinstance(scale, Tensor) and scale.shape == value.shape[-1:]:
                found = self._parameters.get(_memory(scale))
                answer = self._answers[_memory(value)]
                if found is not None and answer.scale is None and output.shape == value.shape:
                    self._answers[_memory(output)] = replace(answer, scale=found[0])

    def _addition(
        self, answers: dict[int, _Answer], args: tuple[Any, ...], before: Tensor | None, total: Tensor
    ) -> None:
        for value, stream in (args[:2], args[1::-1]):
            if not isinstance(value, Tensor) or not isinstance(stream, Tensor) or stream.shape != value.shape:
                continue
            answer = answers.get(_memory(value))
            memory = _memory(stream)
            if answer is None or memory in self._parameters or self._made.get(memory, 0) >= answer.time:
                continue
            if before is not None and stream is args[0]:
                stream = before
            self._observer.added(Addition(answer.site, _rows(stream, value), answer.scale, _rows(total, value)))
            return

    def _selection(self, args: tuple[Any, ...]) -> None:
        """Remember which tokens were last picked out: an expert of a mixture reads them."""
        indices = [index for index in args[1] if index is not None]
        if args[0].ndim == 2 and len(indices) == 1 and indices[0].ndim == 1 and args[0].is_floating_point():
            self._routed = Routed(indices[0], args[0].shape[0])


@dataclass(frozen=True)
class _Answer:
    """Whose answer a tensor holds, since when, and what it was scaled with."""

    site: Site
    time: int
    scale: str | None


def _blank(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return zeros of the shape and the layout in which an operator would answer, without its arithmetic."""
    device = args[0].device
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    shape: Tensor = func(*args, **kwargs)
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device).zero_()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as rows in the order in which `like`, of its shape, lies in memory: attention may swap axes."""
    axes = sorted(range(like.ndim - 1), key=like.stride().__getitem__, reverse=True)
    return tensor.permute(*axes, like.ndim - 1).reshape(-1, like.shape[-1])


def _site(name: str, parameter: Tensor, weight: Tensor) -> Site | None:
    """Return where a matrix `(out, in)` stands in a parameter's memory, or None where it is no plain part of it."""
    if not parameter.is_contiguous() or parameter.ndim not in (2, 3):
        return None
    height, width = parameter.shape[-2:]
    index, offset = divmod(int(weight.storage_offset() - parameter.storage_offset()), height * width)
    if parameter.ndim == 2 and index:
        return None
    start, rest = divmod(offset, width)
    if rest:
        return None
    upright = weight.shape[1] == width and weight.stride() == (width, 1)
    if not upright and (weight.shape[0] != width or weight.stride() != (1, width)):
        return None
    count = weight.shape[0] if upright else weight.shape[1]
    rows = None if count == height else (start, start + count)
    if rows is not None and parameter.ndim == 3:
        return None
    return Site(name, not upright, index if parameter.ndim == 3 else None, rows)
