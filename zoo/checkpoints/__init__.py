"""A reference becomes a proven plan and a filled model.

The files in the order in which a load uses them; `zoo/loading.py` calls `locate`, `plan` and
`fill_weights`.

| file | what it does |
|---|---|
| `sources` | turn a reference (a registry name, `hf:org/repo`, a path) into a local directory |
| `path_reference` | of a path: the directory or file that it means |
| `hub`, `hub_errors` | of a repository on the hub: choose its files; explain the hub's errors |
| `downloads` | download one file, checked by its digest; find damaged files in the cache |
| `file_names` | the usual names of a checkpoint's files |
| `adapters` | an adapter beside the weights: describe it, or refuse it |
| `config_file` | read config.json once, and find its architecture |
| `locate` | turn the directory and its config into a `Located` |
| `handle` | `Located`: config understood, weights not opened; opens the files |
| `zoo_json`, `former_fields` | of a native directory: check its zoo.json, rename former fields |
| `registry_name` | under a registry name: check that the files are what it stands for |
| `build` | build a model on the meta device, or with random weights |
| `plan` | prove that the files fill the model |
| `fill_weights` | read the weights into the model, cast and checked |
| `finite` | find NaN and infinity, and the tensor that they come from |
| `provenance` | record where the weights came from, and whether the files changed since |
| `sentences` | add the pooling and dense layers of sentence embeddings |

Beside loading: `info` describes a checkpoint (`zoo list`, `zoo info`), `destination` decides what
a new checkpoint replaces, `publish` writes it, `plan_by_names` plans the tensors of an optimizer,
`oracle` finds the reference library's class.
"""
