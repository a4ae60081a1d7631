import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
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


def test_save_merged__plain_transformers__says_what_model_and_adapter_say(adapter, tmp_path, capfd):
    save_merged(EnvConfig(), adapter, tmp_path / "merged")
    assert capfd.readouterr().err == ""  # no bars of transformers' own
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


def test_save_merged__caller_in_autocast__writes_the_same_weights(adapter, tmp_path):
    save_merged(EnvConfig(), adapter, tmp_path / "plain")
    with torch.autocast("cpu"):
        save_merged(EnvConfig(), adapter, tmp_path / "autocast")
    plain, autocast = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "autocast"))
    assert all(torch.equal(tensor, autocast[name]) for name, tensor in plain.items())


def test_save_merged__no_such_model__model_error(adapter, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        save_merged(EnvConfig(model="./nowhere"), adapter, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's own, of plain PEFT
@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_save_merged__adapter_on_embeddings_that_the_head_shares__changes_its_own_end_alone(
    embedded_env, tmp_path, modules
):
    env = embedded_env(lora={"r": 4, "target_modules": modules}, auxiliary_updates=0)
    _, info = env.reset(seed=0)
    action = info["action_mask"].astype("int8")
    action[8:] = 0
    env.step(action)
    env.save_adapter(tmp_path / "adapter")
    save_merged(EnvConfig(), tmp_path / "adapter", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(model_folder("tiny"))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("Task: Write ant in the plural.", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        apart = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(**tokens).logits
        torch.testing.assert_close(merged(**tokens).logits, apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_save_adapter__on_the_embeddings__is_read_again(embedded_env, tmp_path, modules):
    settings = {"lora": {"r": 4, "target_modules": modules}, "auxiliary_updates": 0}
    env = embedded_env(**settings)
    env.reset(seed=0)
    env.save_adapter(tmp_path / "adapter")
    again = embedded_env(auxiliary_updates=0, adapter=str(tmp_path / "adapter"))
    again.reset(seed=0)
    assert again.dev_scores == env.dev_scores
