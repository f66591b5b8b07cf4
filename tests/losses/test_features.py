"""FeatureExtractor and its networks: what is kept, what is run, and what is left as it was."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import losses


class Counted(nn.Module):
    """A layer that counts its runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.runs = inner, 0

    def forward(self, x):
        self.runs += 1
        return self.inner(x)


def chain(inplace=False):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(inplace)),
        nn.Conv2d(5, 2, 1),
    ).eval()


class Branching(nn.Module):
    """No chain: one activation serves two places, the second in place."""

    def __init__(self, functional=False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1)})
        self.act = nn.Identity() if functional else nn.ReLU(inplace=True)
        self.functional = functional
        self.last = Counted(nn.Conv2d(4, 2, 1))

    def forward(self, x):
        x = self.stem(x)
        x = F.relu_(x) if self.functional else self.act(x)
        y = self.block["a"](x)
        y += self.block["b"](x)
        y = F.relu_(y) if self.functional else self.act(y)
        return self.last(y)

    def by_hand(self, x):
        stem = self.stem(x)
        a = self.block["a"](stem.relu())
        return {"stem": stem, "block.a": a, "block.b": self.block["b"](stem.relu())}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_chain_gives_each_layer_and_stops(inplace):
    network = chain(inplace)
    network[3] = Counted(network[3])
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    found = losses.FeatureExtractor(network, ["2.0", "0", "1"], normalization=None)(x)
    assert list(found) == ["2.0", "0", "1"]
    first = F.conv2d(x, network[0].weight, network[0].bias, padding=1)
    assert torch.equal(found["0"], first)
    assert torch.equal(found["1"], first.relu())
    assert torch.equal(found["2.0"], F.conv2d(first.relu(), network[2][0].weight, network[2][0].bias))
    assert network[3].runs == 0
    torch.stack([f.sum() for f in found.values()]).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("functional", [False, True])
def test_any_network_gives_each_layer_and_stops(functional):
    network = Branching(functional).eval()
    x = torch.randn(2, 3, 6, 7)
    features = losses.FeatureExtractor(network, ["block.b", "stem", "block.a"], normalization=None)
    for _ in range(2):
        found = features(x)
        assert list(found) == ["block.b", "stem", "block.a"]
        for name, expected in network.by_hand(x).items():
            assert torch.equal(found[name], expected), name
    assert network.last.runs == 0
    assert not any(m._forward_hooks for m in network.modules())


def test_features_that_a_later_operation_overwrites_are_not_what_is_kept():
    network = chain(inplace=True)
    x = torch.randn(1, 3, 5, 5)
    assert bool((losses.FeatureExtractor(network, "0", normalization=None)(x)["0"] < 0).any())
    both = losses.FeatureExtractor(network, ["0", "2.1"], normalization=None)(x)
    assert bool((both["0"] < 0).any())
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    views = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU(inplace=True)).eval()
    kept = losses.FeatureExtractor(views, ["1", "3"], normalization=None)(x)
    assert torch.equal(kept["1"].relu(), kept["3"])
    assert bool((kept["1"] < 0).any())
    assert bool((x < 0).any())  # the images themselves are not overwritten either
    kept["1"].sum().backward()
    torch.testing.assert_close(x.grad, (x > 0) * views[1].weight.sum(0)[None])


def test_hooks_are_gone_after_an_error():
    network = Branching().eval()
    features = losses.FeatureExtractor(network, ["stem", "last"], normalization=None)
    with pytest.raises(RuntimeError):
        features(torch.randn(1, 5, 6, 6))
    assert not any(m._forward_hooks for m in network.modules())
    network.last.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("mine")))
    with pytest.raises(KeyError, match="mine"):
        features(torch.randn(1, 3, 6, 6))
    assert len(network.last._forward_hooks) == 1
    assert not network.stem._forward_hooks


@pytest.mark.parametrize("build", [chain, Branching])
def test_the_network_is_left_as_it_was(build):
    network = build().eval()
    before = copy.deepcopy(network.state_dict())
    layer = "2.0" if build is chain else "block.a"
    features = losses.FeatureExtractor(network, layer, normalization="imagenet")
    holder = nn.ModuleDict({"features": features})
    assert not holder.state_dict()
    assert not list(holder.parameters())
    holder.train()
    assert not network.training
    assert all(p.requires_grad for p in network.parameters())
    x = torch.rand(1, 3, 6, 6, requires_grad=True)
    features(x)[layer].square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    holder.double()
    assert features(x.double())[layer].dtype == torch.float64
    learning = losses.FeatureExtractor(network, layer, normalization=None, learn=True)
    learning(x.double())[layer].sum().backward()
    assert next(network.parameters()).grad.abs().sum() > 0
    network.requires_grad_(False)
    assert torch.equal(copy.deepcopy(features)(x.double())[layer], features(x.double())[layer])


def test_batch_norm_in_training_mode_is_refused_where_it_would_run():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout())
    with pytest.raises(ValueError, match="training mode, with a BatchNorm2d at"):
        losses.FeatureExtractor(network, "2", normalization=None)
    losses.FeatureExtractor(network, "0", normalization=None)  # none runs
    losses.FeatureExtractor(network, "2", normalization=None, learn=True)
    losses.FeatureExtractor(network.eval(), "4", normalization=None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_normalisation_is_of_the_range_and_the_channels(dtype):
    network = nn.Sequential(nn.Identity())
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64).to(dtype)
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in losses.features.IMAGENET)
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        images = (low + (high - low) * x.double()).to(dtype)
        expected = ((images.double() - low) / (high - low) - mean) / std
        found = losses.FeatureExtractor(network, "0", normalization="imagenet", value_range=(low, high))(images)["0"]
        assert found.dtype == dtype
        bound = {torch.float64: 1e-14, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
        assert float((found.double() - expected).norm() / expected.norm()) <= bound
    grey = losses.FeatureExtractor(network, "0", normalization=([0.5], [0.25]))
    assert torch.equal(grey(torch.full((1, 1, 2), 1.0))["0"], torch.full((1, 1, 2), 2.0))


def test_a_layer_that_runs_twice_counts_once():
    network = Branching().eval()
    found = losses.FeatureExtractor(network, "act", normalization=None)(x := torch.randn(1, 3, 4, 4))
    assert torch.equal(found["act"], network.stem(x).relu())


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.same = self.used
        self.pair = nn.LSTM(4, 4)

    def forward(self, x):
        return self.pair(self.used(x)[0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "nine"}, "layers has 'nine', which network lacks; it has 0, 1, 2"),
        ({"layers": ""}, "layers has '', which network lacks"),
        ({"layers": []}, r"layers=\(\), expected names"),
        ({"layers": ["0", "0"]}, "each of them once"),
        ({"normalization": "vgg"}, "normalization='vgg', expected 'imagenet'"),
        ({"normalization": ([0.5], [0.5, 0.5])}, "expected as many of one as of the other"),
        ({"normalization": ([0.5], [0.0])}, "every std above 0"),
        ({"normalization": 3}, "normalization=3"),
        ({"value_range": (1.0, 0.0)}, "low < high"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.FeatureExtractor(chain(), **({"layers": "0", "normalization": None} | arguments))


def test_errors_of_the_images_and_of_networks():
    features = losses.FeatureExtractor(chain(), "0", normalization="imagenet")
    with pytest.raises(TypeError, match=r"images are torch.uint8.*x / 255"):
        features(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 4, 4\), and normalization has 3 channels"):
        features(torch.zeros(1, 1, 4, 4))
    with pytest.raises(TypeError, match="network is a function"):
        losses.FeatureExtractor(lambda x: x, "0", normalization=None)
    wrong = Wrong().eval()
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\['unused'\], which the network's forward does not reach"):
        losses.FeatureExtractor(wrong, "unused", normalization=None)(x)
    with pytest.raises(TypeError, match="layer 'pair' gives a tuple"):
        losses.FeatureExtractor(wrong, "pair", normalization=None)(x)
    with pytest.raises(ValueError, match=r"one module under the names \['used', 'same'\]"):
        losses.FeatureExtractor(wrong, "same", normalization=None)


@pytest.mark.slow
def test_a_chain_compiles_into_one_graph_and_any_network_beside_one():
    x = torch.rand(1, 3, 6, 6)
    features = losses.FeatureExtractor(chain(inplace=True), ["0", "2.1"], normalization="imagenet")
    compiled = torch.compile(features, fullgraph=True)
    for name, found in compiled(x).items():
        torch.testing.assert_close(found, features(x)[name])
    hooked = losses.FeatureExtractor(Branching().eval(), ["stem", "block.a"], normalization="imagenet")
    for name, found in torch.compile(hooked)(x).items():
        torch.testing.assert_close(found, hooked(x)[name])


# ---- networks ----


def test_random_features_follow_the_seed_and_keep_their_scale():
    state = torch.get_rng_state()
    one, same, other = (losses.random_features("vgg16", seed=s, width=16) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(one.conv1_1.weight, other.conv1_1.weight)
    assert not one.training
    assert not any(p.requires_grad for p in one.parameters())
    x = torch.randn(1, 3, 64, 64)
    for init in ("he", "orthogonal"):
        network = losses.random_features("vgg19", width=32, init=init)
        last = losses.FeatureExtractor(network, "relu5_4", normalization=None)(x)["relu5_4"]
        assert 0.03 < float(last.square().mean().sqrt()) < 3
    weight = network.conv2_1.weight.flatten(1)
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-5, rtol=0)
    assert isinstance(losses.random_features(pool="max", width=1).pool1, nn.MaxPool2d)
    with pytest.raises(ValueError, match="init='zero'"):
        losses.random_features(init="zero")
    with pytest.raises(ValueError, match="name='vgg11'"):
        losses.random_features("vgg11")
    with pytest.raises(ValueError, match="pool='median'"):
        losses.random_features(pool="median")
    with pytest.raises(ValueError, match="width=0"):
        losses.random_features(width=0)


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_vgg_features_takes_files_with_torchvisions_names(name, tmp_path):
    source = losses.random_features(name, seed=3)
    indices = {layer: i for i, layer in enumerate(source._modules)}
    assert indices["conv5_1"] == {"vgg16": 24, "vgg19": 28}[name]  # as in torchvision's and piq's tables
    theirs = {f"features.{indices[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in source.state_dict().items()}
    torch.save(theirs | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "w.pth")
    network = losses.vgg_features(name, tmp_path / "w.pth")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in network.state_dict().items())
    assert isinstance(network.pool1, nn.MaxPool2d)
    from safetensors.torch import save_file

    save_file(source.state_dict(), tmp_path / "w.safetensors")
    again = losses.vgg_features(name, tmp_path / "w.safetensors", pool="avg")
    assert torch.equal(again.conv5_3.weight, source.conv5_3.weight)
    del theirs["features.0.bias"]
    with pytest.raises(ValueError, match=f"do not fit {name}: missing or of another shape: conv1_1.bias"):
        losses.vgg_features(name, theirs)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        losses.vgg_features(name, tmp_path / "nowhere.pth")


def test_vgg_features_is_torchvisions():
    models = pytest.importorskip("torchvision.models")
    theirs = models.vgg16(weights=None).eval()
    ours = losses.vgg_features("vgg16", theirs.state_dict())
    x = torch.rand(1, 3, 32, 32)
    found = losses.FeatureExtractor(ours, ["relu5_1", "conv2_2", "pool3"], normalization=None)(x)
    expected = losses.FeatureExtractor(theirs, ["features.25", "features.7", "features.16"], normalization=None)(x)
    for a, b in zip(found.values(), expected.values()):
        torch.testing.assert_close(a, b)


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch):
    import builtins
    import sys
    import types

    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs torchvision, which is not installed; pass weights=FILE"):
        losses.vgg_features("vgg16")
    monkeypatch.undo()

    class Entry:
        @staticmethod
        def get_state_dict(**_):
            raise OSError("no route")

    stub = types.ModuleType("torchvision.models")
    stub.get_model_weights = lambda name: types.SimpleNamespace(IMAGENET1K_V1=Entry)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", stub)
    with pytest.raises(OSError, match=r"could not be had \(no route\); pass weights=FILE"):
        losses.vgg_features("vgg19")


def in_threads(count, run):
    """What ``run`` gives for 0 .. count - 1, all at once, several times each."""
    found, errors, barrier = {}, [], threading.Barrier(count)

    def work(i):
        try:
            barrier.wait()
            found[i] = [run(i) for _ in range(6)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return found


@pytest.mark.parametrize("make", [chain, Branching, lambda: Branching(True)])
def test_several_threads(make):
    """Hooks and detached parameters of one pass are no other's, and the network is left as it was."""
    network = make()
    names = {n: m for n, m in network.named_modules() if n and not list(m.children())}
    layers = [[n for n in names if n.startswith(("stem", "block", "0", "2"))][:2], [list(names)[0]]]
    extractors = [losses.FeatureExtractor(network, wanted, normalization="imagenet") for wanted in layers]
    images = [torch.rand(1, 3, 9 + i, 10) for i in range(4)]
    expected = [extractors[i % 2](images[i]) for i in range(4)]
    parameters = dict(network.named_parameters())

    def run(i):
        leaf = images[i].clone().requires_grad_()
        found = extractors[i % 2](leaf)
        sum(f.sum() for f in found.values()).backward()
        assert bool(leaf.grad.isfinite().all())
        return {name: f.detach() for name, f in found.items()}

    for i, results in in_threads(4, run).items():
        for found in results:
            assert all(torch.equal(found[name], expected[i][name]) for name in expected[i])
    assert not any(m._forward_hooks for m in network.modules())
    assert all(p is parameters[n] and p.requires_grad and p.grad is None for n, p in network.named_parameters())
