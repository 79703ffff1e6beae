# %% [markdown]
# # A persona by deep prompt tuning
#
# A frozen language model learns to answer as a certain person, as in PersonaChat. Trainable prompts stand before every
# conversation, and others are added to them before every block (`tuning_mode="deep_ptune"`). They stay here; servers
# compute the blocks.
#
# As it is, it trains the demo model on a made person, which two servers of this process serve:
#
# `python3 examples/persona_chat.py`
#
# With a real model: `--model NAME --initial-peers HOST:PORT`, and with conversations of your own `--data chat.tsv`, a
# file of lines `question<TAB>answer`.

# %%
import workbench

if __name__ == "__main__":
    workbench.enter()

import torch
from transformers import AutoModelForCausalLM

import local_twins
import texts
from petals_client import AutoDistributedModelForCausalLM

TARGET = 0.6
options = workbench.parse("A persona by deep prompt tuning.", steps=120)
swarm = workbench.Swarm(options)

# %% [markdown]
# ## The model and the person
#
# The answers are what counts for the loss. One way to ask for each fact is held out.

# %%
torch.manual_seed(0)
tokenizer = workbench.load_tokenizer(options.model)
model = AutoDistributedModelForCausalLM.from_pretrained(
    options.model,
    initial_peers=swarm.initial_peers,
    dtype=torch.float32,
    tuning_mode="deep_ptune",
    pre_seq_len=8,
)
model.config.pad_token_id = tokenizer.pad_token_id
training, held_out = texts.persona_chat(False), texts.persona_chat(True)
if options.data is not None:
    pairs = [tuple(line.split("\t")[:2]) for line in options.data.read_text().splitlines()]
    training, held_out = pairs[: -len(pairs) // 8], pairs[-len(pairs) // 8 :]
print(f"before: {held_out[0][0]} {workbench.reply(model, tokenizer, held_out[0][0])}")

# %% [markdown]
# ## Training

# %%


def train(model, name):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    losses = []
    rows = workbench.batches(training, min(18, len(training)))
    for _ in workbench.track(range(options.steps), f"training ({name})"):
        loss = model(**workbench.encode_chat(tokenizer, next(rows))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def held_out_loss(model):
    return float(model(**workbench.encode_chat(tokenizer, held_out)).loss)


twin = local_twins.prompt_twin(model, AutoModelForCausalLM, options.model) if options.compare else None
before = held_out_loss(model)
losses = {"swarm": train(model, "swarm")}
result = held_out_loss(model)

# %% [markdown]
# ## The result
#
# Questions that were not asked in training, and the loss on their answers.

# %%
for question, answer in held_out:
    print(f"{question} {workbench.reply(model, tokenizer, question)} (expected: {answer})")
local = None
if twin is not None:
    losses["local"] = train(twin, "local")
    local = held_out_loss(twin)
print(f"loss on answers that were held out, before: {before:.4f}")
workbench.report("loss on answers that were held out", result, target=TARGET, at_least=False, local=local)
workbench.draw(losses, "A persona by deep prompt tuning", options.pictures / "persona_chat.png")
model.save_pretrained(options.pictures / "persona")
model.close()
swarm.close()
