# %% [markdown]
# # Sentiment by prompt tuning
#
# A frozen language model learns to tell kind sentences from unkind ones, as in SST-2. What trains is small and stays
# here: a few virtual tokens before every sentence (`tuning_mode="ptune"`), and the classifier. The blocks of the model
# are computed by servers, which send gradients back.
#
# As it is, it trains on made sentences with the demo model, which two servers of this process serve:
#
# `python3 examples/sentiment.py`
#
# With a real model and the data of SST-2: `--model NAME --initial-peers HOST:PORT --data train.tsv`, where the file has
# lines `sentence<TAB>label` below a heading.

# %%
import workbench

if __name__ == "__main__":
    workbench.enter()

import torch
from transformers import AutoModelForSequenceClassification

import local_twins
import texts
from petals_client import AutoDistributedModelForSequenceClassification

TARGET = 0.9
options = workbench.parse("Sentiment by prompt tuning.", steps=240)
swarm = workbench.Swarm(options)

# %% [markdown]
# ## The model
#
# Embeddings and classifier are here, the blocks are not. `model.parameters()` holds what trains, and nothing else.

# %%
torch.manual_seed(0)
tokenizer = workbench.load_tokenizer(options.model)
model = AutoDistributedModelForSequenceClassification.from_pretrained(
    options.model,
    initial_peers=swarm.initial_peers,
    dtype=torch.float32,
    num_labels=2,
    tuning_mode="ptune",
    pre_seq_len=8,
)
model.config.pad_token_id = tokenizer.pad_token_id
print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters train")

# %% [markdown]
# ## Training
#
# A plain loop of torch. `train` takes the model as an argument, so that `--compare` can train a local one the same way.

# %%
data = texts.reviews(4928, seed=0) if options.data is None else texts.read_reviews(options.data)
training, held_out = data[:-128], data[-128:]


def encode(rows):
    inputs = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "labels": torch.tensor([label for _, label in rows]),
    }


def train(model, name):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    losses = []
    rows = workbench.batches(training, 16)
    for _ in workbench.track(range(options.steps), f"training ({name})"):
        loss = model(**encode(next(rows))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def accuracy(model):
    inputs = encode(held_out)
    labels = inputs.pop("labels")
    return float((model(**inputs).logits.argmax(-1) == labels).float().mean())


twin = None
if options.compare:
    twin = local_twins.prompt_twin(model, AutoModelForSequenceClassification, options.model, num_labels=2)
losses = {"swarm": train(model, "swarm")}
result = accuracy(model)

# %% [markdown]
# ## The result
#
# Sentences that the model has not seen, the loss curve, and what was trained in a file of its own.

# %%
local = None
if twin is not None:
    losses["local"] = train(twin, "local")
    local = accuracy(twin)
workbench.report("accuracy on sentences that were held out", result, target=TARGET, at_least=True, local=local)
workbench.draw(losses, "Sentiment by prompt tuning", options.pictures / "sentiment.png")
model.save_pretrained(options.pictures / "sentiment")
print(f"saved: {options.pictures / 'sentiment'} (load it with from_pretrained(..., tuned=...))")
model.close()
swarm.close()
