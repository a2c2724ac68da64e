"""The shipped model, the systems that infer its latent, and the trained model as a value.

| module | contents |
|---|---|
| `arithmetic` | matrix products and convolutions in float32 or bfloat16 |
| `networks` | feature extractors |
| `autoencoder` | encoder, decoder and output density; the model at one example |
| `flows` | normalizing flows |
| `iterative` | the network of iterative amortized inference |
| `linear` | probabilistic PCA and factor analysis |
| `systems` | inference systems, each a function |
| `trained` | `Trained`, a model as a value, and `initialize` |
| `saved` | `load` and `save` |
"""
