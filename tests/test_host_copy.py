"""Bringing what is recorded to main memory: with links that are slow, full, broken or interrupted, as a GPU's can be.

The links here copy as late as they may: when they are waited for. So whatever is changed or used again too early, or
read before it has arrived, is seen.
"""

import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from small_pipelines import SMALL
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import attnlab as al
from attnlab.recording import host_copy
from attnlab.recording.host_copy import HostCopy
from attnlab.recording.keys import KeyWatch

CPU = torch.device("cpu")
KEPT = [{"keep": "queries"}, {"keep": "queries", "dtype": torch.float16}, {"keep": "sum"}, {"keep": "maps"}]
KEPT += [
    {"keep": "contributions"},
    {"texts": ["fire and a tree", "smoke"]},
    {"self_attention": [16, 8]},
    {"agreement": 8},
]


class SlowLink:
    """A link that copies when it is waited for, some time later."""

    def __init__(self, device=None):
        self.begun = 0

    def slot(self, size):
        return torch.full((size,), 77, dtype=torch.uint8)

    def start(self, source, slot):
        self.begun += 1

        def wait():
            time.sleep(0.001)
            slot[: len(source)].copy_(source)

        return wait


@pytest.fixture
def slow(monkeypatch):
    """Make every copy one over a slow link, as if the model ran on a GPU; return the links that come to be."""
    links = []
    monkeypatch.setattr(host_copy, "link_between", lambda source, target: links.append(SlowLink()) or links[-1])
    return links


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=al.seed(seed)).to(dtype)


@pytest.mark.parametrize("slot", [64, 4096])
def test_what_arrives_is_what_was_sent(slow, slot):
    """Also in parts smaller than a tensor, of several types at once, and of none."""
    sent = [
        [numbers(5, 7, seed=k), numbers(3, dtype=torch.float16, seed=k), numbers(2, 2, 9, seed=k)] for k in range(9)
    ]
    way = HostCopy(CPU, slot)
    arriving = [way.send(tensors) for tensors in sent]
    assert way.send([]) == []
    way.wait()
    assert way.arrived == way.sent == sum(link.begun for link in slow) > 9
    for tensors, found in zip(sent, arriving, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, found, strict=True))
    way.close()
    assert "attnlab host copy" not in [thread.name for thread in threading.enumerate()]


def test_nothing_is_copied_on_one_device():
    tensors = [numbers(4)]
    way = HostCopy(CPU)
    assert way.send(tensors)[0] is tensors[0] and way.arrived == way.sent == 0
    way.wait()


def test_a_full_ring_makes_the_next_copy_wait(slow):
    """No more than four copies are on their way, whatever is asked for."""
    gate, way, made = threading.Event(), HostCopy(CPU, slot=16), []
    way._link(CPU).start = lambda source, slot: made.append(1) or (lambda: gate.wait(10) and slot.copy_(source))
    sender = threading.Thread(target=way.send, args=([numbers(40)],))  # ten slots
    sender.start()
    sender.join(0.2)
    assert sender.is_alive() and len(made) == 4
    gate.set()
    sender.join(10)
    way.wait()
    assert len(made) == 10 == way.arrived
    way.close()


def test_an_error_on_the_way_reaches_the_user(slow):
    """And nothing blocks after it, however much is sent."""
    way = HostCopy(CPU, slot=16)

    def broken(source, slot):
        def wait():
            raise OSError("the device is lost")

        return wait

    way._link(CPU).start = broken
    with pytest.raises(RuntimeError, match="could not be brought to cpu") as caught:
        for _ in range(100):
            way.send([numbers(40)])
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(RuntimeError, match="could not be brought"):
        way.wait()
    way.close()


def test_an_interrupt_costs_no_slot(slow):
    way, start = HostCopy(CPU, slot=16), SlowLink().start
    link = way._link(CPU)
    for _ in range(6):

        def interrupted(source, slot):
            raise KeyboardInterrupt

        link.start = interrupted
        with pytest.raises(KeyboardInterrupt):
            way.send([numbers(4)])
    link.start = start
    [found] = way.send([numbers(40)])
    way.wait()
    assert torch.equal(found, numbers(40))
    way.close()


def all_of(recording):
    """Every tensor of a recording, layers' weights too."""
    for trace in recording.traces:
        yield from trace.tensors()
        for layer in trace.layers.values():
            yield from layer.weights.values()


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_recordings_are_the_same_over_a_slow_link(levels, generate, monkeypatch, kept):
    """To the last bit, of two images and two generations; the image too."""

    def record():
        with al.record(levels, **kept) as recording:
            image = generate(["a house", "a red car and smoke"], pipe=levels, steps=3)
            generate("a tree", pipe=levels, steps=2)
        return image, list(all_of(recording))

    image, expected = record()
    with monkeypatch.context() as patch:
        links = []
        patch.setattr(host_copy, "link_between", lambda source, target: links.append(SlowLink()) or links[-1])
        again, found = record()
    assert torch.equal(image, again) and links[0].begun
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "attnlab host copy" not in [thread.name for thread in threading.enumerate()]


def test_equal_weights_are_held_once_over_a_slow_link(pipe, generate, slow):
    with al.record(pipe, keep="sum") as recording:
        generate(steps=1)
        generate(steps=1)
    first, second = (trace.layers for trace in recording.traces)
    assert all(first[name] is second[name] for name in first)


def test_inside_the_block_what_is_on_its_way_is_waited_for(pipe, generate, slow, recording):
    with al.record(pipe) as found:
        generate()
        for a, b in zip(found.trace.queries.values(), recording.trace.queries.values(), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        part = found[0]
        assert (al.daam(part).values == al.daam(recording).values).all()


def test_an_interrupt_leaves_whole_steps(pipe, generate, slow, recording):
    """In the middle of the third step, with copies in flight."""
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    late = pipe.unet.up_blocks[-1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), al.record(pipe) as found:
            generate()
    finally:
        late.remove()
    assert found.trace.steps == [0, 1] and not found.complete
    for name, queries in found.trace.queries.items():
        assert all(torch.equal(a, b) for a, b in zip(queries, recording.trace.queries[name][:2], strict=True))


@pytest.mark.parametrize("kept", [{"keep": "queries"}, {"keep": "sum"}], ids=str)
def test_keys_that_change_are_found_without_waiting_for_them(pipe, generate, monkeypatch, kept):
    """At the latest at the end; what was recorded after the change is wrong, and sums cannot be undone: all goes."""
    gate, module = threading.Event(), pipe.unet.up_blocks[2].attentions[0].transformer_blocks[0].attn2.to_k
    before = module.weight.clone()

    def switch(pipe, step, timestep, kwargs):
        if step == 1:
            module.weight.data *= 1.5
        return kwargs

    class Late(SlowLink):
        def slot(self, size):
            return torch.empty(size, dtype=torch.uint8)

        def start(self, source, slot):
            return lambda: gate.wait(10) and slot[: len(source)].copy_(source)

    monkeypatch.setattr(host_copy, "link_between", lambda source, target: Late())
    monkeypatch.setattr(host_copy, "_SLOTS", 64)  # room for the whole generation
    ran = []
    try:
        with (
            pytest.raises(RuntimeError, match=r"up_blocks\.2.*change at step 2.*steps=range\(2\)"),
            al.record(pipe, **kept) as found,
        ):
            generate(callback_on_step_end=switch)
            ran.append(True)
            gate.set()
    finally:
        module.weight.data.copy_(before)
    assert ran and not found.traces[0].steps and not list(found.traces[0].queries) and not found.traces[0].sums


def test_a_watch_of_keys_ends_its_thread_after_an_error(monkeypatch):
    class Broken(SlowLink):
        def start(self, source, slot):
            def wait():
                raise OSError("the device is lost")

            return wait

    monkeypatch.setattr(host_copy, "link_between", lambda source, target: Broken())
    watch, before = KeyWatch(), set(threading.enumerate())
    watch.compare({"a layer": numbers(3, 4)}, 0)
    [thread] = set(threading.enumerate()) - before
    with pytest.raises(RuntimeError, match="could not be brought to cpu"):
        watch.end()
    assert not thread.is_alive()


WAITS = {"item", "__float__", "__int__", "__bool__", "__index__", "__contains__", "tolist", "numpy", "cpu", "cuda"}
WAITS |= {"equal", "allclose", "nonzero", "unique", "is_nonzero", "masked_select", "synchronize", "argwhere"}


class Watch(TorchFunctionMode):
    """Note what the recording modules ask of tensors that would make a program wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.on, self.found, self.seen = False, [], 0
        self.there = set()  # addresses in main memory, to which something was sent

    def __torch_function__(self, func, types, args=(), kwargs=None):
        own = next((name for name in callers() if "attnlab/recording" in name), "tap.py")
        if self.on and "tap.py" not in own:  # which passes on what the model itself asks for
            self.seen += 1
            name = getattr(func, "__name__", str(func))
            moves = name == "to" and any(
                isinstance(x, torch.device | str) for x in [*args[1:], *(kwargs or {}).values()]
            )
            there = args and torch.is_tensor(args[0]) and args[0].untyped_storage().data_ptr() in self.there
            picks = name == "__getitem__" and any(isinstance(i, list | torch.Tensor) for i in as_tuple(args[1]))
            if not there and (name in WAITS or picks or (moves and not (kwargs or {}).get("non_blocking"))):
                self.found.append((name, next(f for f in callers() if "attnlab/recording" in f)))
        return func(*args, **(kwargs or {}))


def as_tuple(index):
    return index if isinstance(index, tuple) else (index,)


def callers():
    frame = sys._getframe(2)
    while frame:
        yield f"{frame.f_code.co_filename.replace(chr(92), '/')}:{frame.f_lineno}"
        frame = frame.f_back


@pytest.fixture
def watch(slow, monkeypatch):
    """Watch over the steps of a generation, by a callback at the end of each: from the second of four to the last."""
    watch, send = Watch(), HostCopy.send

    def noted(way, tensors):
        found = send(way, tensors)
        watch.there |= {tensor.untyped_storage().data_ptr() for tensor in found}
        return found

    monkeypatch.setattr(HostCopy, "send", noted)

    def switch(pipe, step, timestep, kwargs):
        watch.on = step < 3  # off at the end: a generation ends with one wait
        return kwargs

    watch.callback = switch
    with watch:
        yield watch


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_no_step_but_the_first_asks_a_gpu_for_a_number(levels, generate, watch, kept):
    """What would wait for the device, or copy from it and wait, is on a list of forbidden calls."""
    with al.record(levels, **kept):
        generate(["a house", "a red car"], pipe=levels, steps=4, callback_on_step_end=watch.callback)
        watch.on = False
    assert watch.seen > 50 and watch.found == []


@pytest.mark.parametrize("kept", [{}, {"agreement": 4}], ids=str)
@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "z_image", "lumina2", "hidream", "sana"])
def test_nor_does_a_transformers(family, kept, watch):
    if family == "sana" and kept:
        pytest.skip("its self-attention is not recorded")
    pipe, call = SMALL[family]()
    pipe.set_progress_bar_config(disable=True)
    call |= {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": watch.callback}
    with al.record(pipe, **kept):
        pipe(**call, generator=al.seed(0))
        watch.on = False
    assert watch.seen > 50 and watch.found == []


def test_a_model_that_is_compiled_inside_the_block_is_recorded(pipe, generate):
    """Compiled code stops at each tap and goes on behind it; without a compiler for C++ here, by the eager backend."""
    parts = {name: part for name, part in pipe.components.items() if name != "unet"}
    unet = type(pipe.unet).from_config(pipe.unet.config, cross_attention_dim=128).eval()
    unet.load_state_dict(pipe.unet.state_dict())
    compiled = type(pipe)(unet=unet, requires_safety_checker=False, **parts)
    compiled.set_progress_bar_config(disable=True)
    with al.record(pipe) as recording:
        expected = generate(steps=2)
    try:
        with al.record(compiled) as found:
            compiled.unet.compile(backend="eager")
            image = generate(steps=2, pipe=compiled)
    finally:
        torch.compiler.reset()
    assert torch.equal(image, expected) and compiled.unet._compiled_call_impl is not None
    assert all(torch.equal(a, b) for a, b in zip(all_of(found), all_of(recording), strict=True))


@pytest.mark.parametrize("weights", ["cpu", "lazy"])
@pytest.mark.parametrize("keep", ["queries", "sum", "maps", "contributions"])
def test_maps_of_a_recording_on_a_gpu_mix_no_devices(levels, generate, keep, weights):
    """Tensors that only have a shape, on a device of which every build of torch knows ("lazy"), as if it were a GPU."""
    with al.record(levels, keep=keep, texts=["smoke"]) as recording:
        generate(pipe=levels, steps=2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def on(device, tensor):
            return mode.from_tensor(tensor).to(device)

        trace = replace(recording.trace)
        trace.layers = {
            n: layer.moved(lambda some: [on(weights, x) for x in some]) for n, layer in trace.layers.items()
        }
        trace.queries = {n: [on("lazy", x) for x in some] for n, some in trace.queries.items()}
        trace.sums = {n: on("lazy", x) for n, x in trace.sums.items()}
        trace.streamed = {t: {n: on("lazy", x) for n, x in sums.items()} for t, sums in trace.streamed.items()}
        there, asked = al.Recording(recording.encoder, [trace]), []
        if trace.queries or keep == "maps":
            asked += [lambda: al.daam(there), lambda: al.daam(there, per="layer")]
        if trace.queries or keep == "contributions":
            asked += [lambda: al.contributions(there), lambda: al.contributions(there, kind="projection")]
        if trace.queries or trace.sums:
            asked += [lambda: al.linear_daam(there)]
        if keep != "contributions":
            asked += [lambda: al.ovam(there, "smoke")]
        for ask in asked:
            with pytest.raises(DataDependentOutputException):  # of the look for NaN, the first that needs a value
                ask()
    assert asked
