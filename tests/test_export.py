import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from raise_env import EnvConfig
from raise_env.base_model import model_folder
from raise_env.errors import ModelError
from raise_env.export import save_merged


@pytest.fixture
def adapter(embedded_env, tmp_path):
    """The folder of an adapter that has learned a little."""
    env = embedded_env()
    _, info = env.reset(seed=0)
    for _ in range(2):
        action = info["action_mask"].astype("int8")
        action[8:] = 0
        _, _, _, _, info = env.step(action)
    env.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_save_merged__plain_transformers__says_what_model_and_adapter_say(adapter, tmp_path):
    save_merged(EnvConfig(), adapter, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(model_folder("tiny"))
    tokens = tokenizer("Task: Write ant in the plural.\nAnswer: ants", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        bare = base(**tokens).logits
        apart = PeftModel.from_pretrained(base, str(adapter))(**tokens).logits
        whole = merged(**tokens).logits
    torch.testing.assert_close(whole, apart, atol=1e-4, rtol=1e-4)
    assert (apart - bare).abs().max() > 0.1
    assert not any("lora" in name for name in merged.state_dict())


def test_save_merged__no_such_model__model_error(adapter, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        save_merged(EnvConfig(model="./nowhere"), adapter, tmp_path / "merged")
