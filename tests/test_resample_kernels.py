"""The CUDA text without a GPU: it compiles for the architectures in use, and run on the CPU it
says what the reference says. With a GPU and CuPy the same cases run there."""

import itertools
from pathlib import Path

import pytest
import torch
from cuda_text import OnCPU, find_nvrtc
from resample_cases import STORED, check_close, draw_case, draw_out

from fd3d import cuda
from fd3d.resample import device
from fd3d.resample.taps import spread_taps

KERNELS = Path(device.__file__).with_name("kernels.cu")
RESULTS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> OnCPU:
    return OnCPU(tmp_path_factory.mktemp("kernels"), KERNELS, ["resample", "spread"])


def run_case(on_cpu: OnCPU, case, out):
    valid = torch.zeros((len(case.map), 1, *case.plan.to_shape), dtype=torch.bool)
    args = device.resample_args(
        case.map, scale=case.scale, zero=case.zero, plan=case.plan, out=out, valid=valid
    )
    packed = device.packed(case.map, out)
    options = device.options(stored=case.map.dtype, result=out.dtype, packed=packed)
    on_cpu.run("resample", options, device.blocks(case.plan, case.map.shape[1]), args)
    return valid, packed


def check_transpose(case, grad, found):
    """To 1e-5 of the largest sum of magnitudes in a channel: a weight of nearly 0 is 1 - 0.99..."""
    expected = spread_taps(grad.double(), scale=case.scale, plan=case.plan)
    size = spread_taps(grad.double().abs(), scale=case.scale, plan=case.plan)
    assert ((found - expected).abs() <= 1e-5 * size.amax(dim=(2, 3), keepdim=True)).all()


@pytest.mark.parametrize("block", range(10))
def test_five_hundred_drawn_cases_agree_with_the_reference(on_cpu, block):
    for seed in range(50 * block, 50 * block + 50):
        case = draw_case(seed)
        out = draw_out(case, seed)
        valid, _ = run_case(on_cpu, case, out)
        check_close(case, out, valid, case.reference())


def test_the_drawn_cases_reach_both_forms_of_the_kernel():
    made = [(draw_case(seed), seed) for seed in range(500)]
    forms = [device.packed(case.map, draw_out(case, seed)) for case, seed in made if len(case.map)]
    assert 20 < sum(forms) < len(forms) - 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cast_is_torchs(on_cpu, dtype):
    for seed in range(500, 540):
        case = draw_case(seed)
        wide, narrow = draw_out(case, seed), draw_out(case, seed, dtype)
        # The wide sum must not be made by the other form of the loop.
        if device.packed(case.map, wide) != device.packed(case.map, narrow):
            continue
        run_case(on_cpu, case, wide)
        run_case(on_cpu, case, narrow)
        torch.testing.assert_close(narrow, wide.to(dtype), rtol=0, atol=0)


def test_the_transpose_is_that_of_torch(on_cpu):
    for seed in range(600, 680):
        case = draw_case(seed)
        if not case.map.numel():
            continue
        dtype = RESULTS[seed % 3]
        grad = torch.randn_like(draw_out(case, seed)).to(dtype)
        result = torch.zeros(case.map.shape)
        if seed % 2:
            result = result.contiguous(memory_format=torch.channels_last)
        args = device.spread_args(grad, scale=case.scale, plan=case.plan, map=result)
        options = device.options(
            stored=torch.float32, result=dtype, packed=device.packed(grad, result)
        )
        on_cpu.run("spread", options, device.blocks(case.plan, grad.shape[1]), args)
        check_transpose(case, grad, result)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_100"])
def test_the_kernels_compile_for(architecture):
    nvrtc = find_nvrtc()
    for stored, result, packed in itertools.product(STORED, RESULTS, (False, True)):
        options = device.options(stored=stored, result=result, packed=packed)
        made = nvrtc.compile(device.source(), [*options, f"--gpu-architecture={architecture}"])
        assert made[:4] == b"\x7fELF" and b"resample" in made and b"spread" in made


@pytest.mark.gpu
@pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
def test_the_gpu_agrees_with_the_reference_on_the_drawn_cases():
    for seed in range(500):
        case = draw_case(seed)
        if not case.map.numel():
            continue
        # A move to the device keeps strides only of maps without gaps.
        moved, out = case.map.cuda(), draw_out(case, seed).cuda()
        valid = torch.empty((len(moved), 1, *case.plan.to_shape), dtype=torch.bool, device="cuda")
        device.resample_cupy(
            moved,
            scale=case.scale.cuda(),
            zero=case.zero.cuda(),
            plan=case.plan,
            out=out,
            valid=valid,
        )
        check_close(case, out.cpu(), valid.cpu(), case.reference())


@pytest.mark.gpu
@pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
def test_the_gpu_transpose_is_that_of_torch():
    for seed in range(600, 680):
        case = draw_case(seed)
        if not case.map.numel():
            continue
        grad = torch.randn_like(draw_out(case, seed))
        found = device.spread_cupy(grad.cuda(), scale=case.scale.cuda(), plan=case.plan).cpu()
        check_transpose(case, grad, found)
