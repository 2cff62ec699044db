"""The log-sum-exp of a stock attention call: what the kernel computed, and the call as it was without it."""

import pytest
import torch
import torch.nn.functional as F

from eval.cost.captured_step import capture
from goca_guidance.hooks import log_sum_exp
from goca_guidance.hooks.log_sum_exp import LogSumExp, wanted
from tests.helpers.families import FAMILIES, stock_pipeline


def test_the_call_is_bit_equal_and_its_log_sum_exp_exact():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 40, generator=generator) for n in (17, 9, 9))
    kept = torch.rand(2, 1, 1, 9, generator=generator) > 0.3
    for grad in (torch.no_grad, torch.inference_mode):
        for mask in (None, kept, torch.zeros(2, 1, 17, 9)):
            with grad():
                stock = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
                with LogSumExp() as told:
                    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
            logits = query.double() @ key.double().mT * 0.3
            hidden = torch.zeros(()) if mask is not kept else torch.zeros(kept.shape).masked_fill(~kept, -torch.inf)
            assert torch.equal(stock, seen)
            assert torch.allclose(told.found.double(), (logits + hidden).logsumexp(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("statistics", [None, torch.empty(0)])
def test_a_kernel_that_was_not_asked_for_it_tells_nothing(statistics, monkeypatch):
    """cuDNN's second output is None then (seen on an H200)."""

    def kernel(query):
        return query, statistics

    monkeypatch.setattr(log_sum_exp, "KERNELS", (kernel,))
    query = torch.zeros(1, 2, 3, 4)
    told = LogSumExp()
    assert told.__torch_dispatch__(kernel, (), (query,))[0] is query
    assert told.found is None


@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
def test_records_carry_it_where_it_is_asked_for(name, monkeypatch):
    """Of the pixels' own rows, also where words attend beside them; nothing is told unless it is asked for."""
    for asked in ("0", "1"):
        monkeypatch.setenv("GOCA_LSE", asked)
        call = {"prompt": "a cat on grass", "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        records = capture(stock_pipeline(name), 1, **call, **FAMILIES[name].call).calls[0]
        for record in records:
            logits = record.query.double() @ record.key.double().mT * record.scale
            logits = logits if record.mask is None else logits + record.mask
            expected = logits.logsumexp(-1).float() if asked == "1" else None
            assert (record.lse is None) == (asked == "0")
            assert expected is None or torch.allclose(record.lse, expected, rtol=0, atol=1e-4)


def test_another_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("GOCA_LSE", "yes")
    with pytest.raises(ValueError, match=r"^Expected GOCA_LSE to be 0 or 1, but got 'yes': set it"):
        wanted()
