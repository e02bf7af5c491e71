"""An encoder exported as ONNX exporters do it, rebuilt: the same tensors, an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from bmm.zoo import dinov2
from bmm.zoo.dinov2 import encoder_config, encoder_tensors, write_base
from bmm.zoo.onnx_tensors import Graph, Node, OnnxError

OLD = {new: old for old, new in dinov2._RENAMED.items()}


def exported(base: Path) -> Graph:
    """The pico encoder's graph: nameless, transposed matrices at `MatMul` nodes, positions in two constants."""
    nodes, tensors = [], {}
    for name, value in AutoModel.from_pretrained(base).state_dict().items():
        for new, old in OLD.items():
            name = name.replace(new, old)
        array = value.numpy()
        layer, _, kind = name.rpartition(".")
        if name == "embeddings.position_embeddings":
            for index, (part, node) in enumerate(
                [(array[:, :1], dinov2._CLASS_POSITION), (array[:, 1:], dinov2._PATCH_POSITIONS)]
            ):
                tensors[f"onnx::Position_{index}"] = part
                nodes.append(Node(node, "Reshape", (f"onnx::Position_{index}", "shape")))
        elif kind == "weight" and array.ndim == 2:
            tensors[f"onnx::MatMul_{len(nodes)}"] = array.T
            path = "/backbone/" + layer.replace("encoder.layer.", "encoder/layer.", 1)
            head, _, tail = path.partition("layer.")
            number, _, rest = tail.partition(".")
            named = f"{head}layer.{number}/{rest.replace('.', '/')}/MatMul"
            nodes.append(Node(named, "MatMul", ("x", f"onnx::MatMul_{len(nodes)}")))
        else:
            tensors[f"backbone.{name}"] = array
            nodes.append(Node(f"/backbone/{layer}/Add", "Add", ("x", f"backbone.{name}")))
    tensors["decoder.conv.weight"] = np.ones((1, 2, 3, 3), dtype=np.float32)
    nodes.append(Node("/decoder/conv/Conv", "Conv", ("x", "decoder.conv.weight")))
    return Graph(tuple(nodes), tensors)


@pytest.fixture
def graph(pico_vision_base: Path, monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.setattr(dinov2, "_HEADS", 2)
    graph = exported(pico_vision_base)
    monkeypatch.setattr(dinov2, "read_graph", lambda _: graph)
    return graph


def test_the_encoder_is_rebuilt_tensor_by_tensor(graph: Graph, pico_vision_base: Path, tmp_path: Path) -> None:
    write_base(b"", tmp_path)
    expected = AutoModel.from_pretrained(pico_vision_base).eval()
    model, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert model.config.image_size == expected.config.image_size
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.eval()(pixels).last_hidden_state, expected(pixels).last_hidden_state)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    grey = processor(images=[np.full((28, 28, 3), 128, dtype=np.uint8)], return_tensors="pt")["pixel_values"]
    assert tuple(grey.shape) == (1, 3, 56, 56)
    assert grey[0, :, 0, 0].tolist() == pytest.approx(
        [(128 / 255 - mean) / std for mean, std in zip(dinov2.IMAGE_MEAN, dinov2.IMAGE_STD, strict=True)], abs=1e-5
    )


def test_equal_files_give_equal_bytes(graph: Graph, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_base(b"", tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_shapes_tell_the_configuration(graph: Graph) -> None:
    assert encoder_config(encoder_tensors(graph)) == {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "num_channels": 3,
        "patch_size": 4,
        "image_size": 16,
        "layer_norm_eps": 1e-6,
        "use_mask_token": False,
    }


def test_another_model_is_refused(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(other: Graph, said: str) -> None:
        monkeypatch.setattr(dinov2, "read_graph", lambda _: other)
        with pytest.raises(OnnxError, match=said):
            write_base(b"", tmp_path)

    refused(Graph((), {}), "no position embeddings")
    positions = tuple(node for node in graph.nodes if node.operator == "Reshape")
    refused(Graph(positions, graph.tensors), "other tensors|no Dinov2 encoder")
    without = {name: tensor for name, tensor in graph.tensors.items() if name != "backbone.layernorm.bias"}
    refused(Graph(graph.nodes, without), "other tensors")
