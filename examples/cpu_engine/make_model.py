"""Make a small Llama with random weights from a fixed seed, for tests and the first `up`.

    python make_model.py FOLDER

4 layers, hidden size 256, vocabulary 512: 10 MB in several safetensors shards with an index,
as real models have. Run it with the engine's Python (needs transformers and tokenizers).
"""

import sys
import tempfile
from pathlib import Path

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it does so once again."
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
)


def make_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SENTENCE], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    fast.chat_template = CHAT_TEMPLATE

    torch.manual_seed(20261121)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch, max_shard_size="4MB")
        fast.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            file.chmod(0o644)  # other users of the machine may serve it, too
        Path(scratch).rename(folder)  # the folder appears whole or not at all
        Path(scratch).mkdir()  # so that the context manager has something to remove
    folder.chmod(0o755)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    if (target / "config.json").is_file():
        print(f"{target} is there already")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        make_model(target)
        print(f"made {target}")
