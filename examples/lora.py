# %% [markdown]
# # LoRA through a swarm
#
# Low-rank matrices beside the linear layers of blocks that are somewhere else. The matrices and the optimizer are here
# (`tuning_mode="lora"`); servers hold the matrices' values for as long as the client is connected, compute with them,
# and send their gradients back. The result is an adapter in PEFT's format, which servers can load for everybody.
#
# As it is, the demo model learns to turn commands to a house into calls of functions:
#
# `python3 examples/lora.py`
#
# With a real model: `--model NAME --initial-peers HOST:PORT`, and with data of your own `--data pairs.tsv`, a file of
# lines `request<TAB>answer`.

# %%
import workbench

if __name__ == "__main__":
    workbench.enter()

import torch
from transformers import AutoModelForCausalLM

import local_twins
import texts
from petals_client import AutoDistributedModelForCausalLM

TARGET = 0.95
options = workbench.parse("LoRA through a swarm.", steps=60)
swarm = workbench.Swarm(options)

# %% [markdown]
# ## The model
#
# Names of layers are PEFT's; "all-linear" are all of a block.

# %%
torch.manual_seed(0)
tokenizer = workbench.load_tokenizer(options.model)
model = AutoDistributedModelForCausalLM.from_pretrained(
    options.model,
    initial_peers=swarm.initial_peers,
    dtype=torch.float32,
    tuning_mode="lora",
    lora_rank=8,
    lora_alpha=16,
    target_modules="all-linear",
)
model.config.pad_token_id = tokenizer.pad_token_id
print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters train")

# %% [markdown]
# ## Training
#
# Some pairs of room and device occur in commands that are held out, and in no others.

# %%
if options.data is None:
    training = texts.commands(640, seed=0, is_held_out=False)
    held_out = texts.commands(64, seed=1, is_held_out=True)
else:
    pairs = [tuple(line.split("\t")[:2]) for line in options.data.read_text().splitlines()]
    training, held_out = pairs[: -len(pairs) // 10], pairs[-len(pairs) // 10 :]


def train(model, name):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.005)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    losses = []
    rows = workbench.batches(training, 16)
    for _ in workbench.track(range(options.steps), f"training ({name})"):
        loss = model(**workbench.encode_chat(tokenizer, next(rows))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def share_correct(model):
    """Held-out commands whose whole answer is the likeliest at each of its tokens."""
    inputs = workbench.encode_chat(tokenizer, held_out)
    labels = inputs.pop("labels")[:, 1:]
    likeliest = model(**inputs).logits.argmax(-1)[:, :-1]
    return float(((likeliest == labels) | (labels == -100)).all(dim=1).float().mean())


twin = local_twins.lora_twin(model, AutoModelForCausalLM, options.model) if options.compare else None
losses = {"swarm": train(model, "swarm")}
result = share_correct(model)

# %% [markdown]
# ## The result

# %%
local = None
if twin is not None:
    losses["local"] = train(twin, "local")
    local = share_correct(twin)
workbench.report("share of held-out commands that are understood", result, target=TARGET, at_least=True, local=local)
workbench.draw(losses, "LoRA through a swarm", options.pictures / "lora.png")
folder = options.pictures / "house-adapter"
model.save_pretrained(folder)
model.close()
print(f"saved: {folder}, for PEFT and for petals-server serve ... --adapters {folder}")

# %% [markdown]
# ## For everybody
#
# Servers that have loaded the adapter answer whoever asks for it by its name.

# %%
served = None
if swarm.add_servers(f"house={folder}"):
    user = AutoDistributedModelForCausalLM.from_pretrained(
        options.model, initial_peers=swarm.initial_peers, dtype=torch.float32, active_adapter="house"
    )
    served = share_correct(user)
    print(f"with active_adapter='house': {served:.4f}")
    for command, _ in held_out[:3]:
        print(f"{command} -> {workbench.reply(user, tokenizer, command)}")
    user.close()
swarm.close()
