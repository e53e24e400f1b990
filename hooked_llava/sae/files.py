"""Sparse autoencoders as files, in the two formats of the field: sparsify's (the released one of 2411.14982) and SAELens's.

A folder holds `cfg.json` and one file of tensors: `sae.safetensors` for sparsify, `sae_weights.safetensors` for SAELens. What
SAELens's config says of the input (no subtraction of the decoder's bias, a choice by decoder norm) is folded into the weights,
so that one formula serves all files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.errors import CheckpointError
from hooked_llava.loading.embedded import EMBEDDED, resolve
from hooked_llava.sae.autoencoder import WITH_THRESHOLD, Kind, SAEConfig, SparseAutoencoder
from hooked_llava.storage import read_json, read_safetensors, write_json, write_safetensors

FileFormat: TypeAlias = Literal["sparsify", "saelens"]
"""Whose files."""
CONFIG = "cfg.json"
WEIGHTS: dict[FileFormat, str] = {"sparsify": "sae.safetensors", "saelens": "sae_weights.safetensors"}
"""Name of the file of tensors."""
TRAINING = "training"
"""The field of both configs that says how the autoencoder was trained."""
_SAELENS_KINDS: dict[str, Kind] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jump_relu",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka",
}
# Fields of the configs and the values that this formula covers; what they ask for otherwise is refused, not ignored.
_SPARSIFY_COVERS = {"activation": ("topk",), "skip_connection": (False,), "transcode": (False,)}
_SAELENS_COVERS = {"normalize_activations": ("none",), "architecture": tuple(_SAELENS_KINDS)}


def load_sae(
    name: str | os.PathLike[str],
    hookpoint: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> SparseAutoencoder:
    """Read a sparse autoencoder that sparsify, SAELens or `save_sae` wrote, from the package, a folder or the hub.

    Args:
        name: "tiny-shapes" for the one that comes with the package; the folder; or the hub's owner/name.
        hookpoint: the folder inside it, such as "model.layers.24"; sparsify keeps one for each hook.
        device: where the weights go.
        dtype: of the weights; as stored by default.
        revision: branch, tag or commit on the hub.
        token: for the hub's gated and private repositories.
        cache_dir: where what comes from the hub is kept.

    Raises `CheckpointError` for a folder without the two files, for tensors that do not fit the config or are not finite, and
    for a config that asks for something else than this class computes (transcoders, groupmax, gated autoencoders, normalised
    inputs), naming the field.
    """
    within = f"{hookpoint}/" if hookpoint else ""
    files = [within + file for file in (CONFIG, *WEIGHTS.values())]
    folder = resolve(name, revision=revision, token=token, cache_dir=cache_dir, files=files) / within
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if hookpoint is None and name in EMBEDDED and len(inside) == 1:
        folder = inside[0]
    found: list[FileFormat] = [kind for kind, file in WEIGHTS.items() if (folder / file).is_file()]
    if not (folder / CONFIG).is_file() or not found:
        names = [path.name for path in inside]
        hint = f" Its folders {names} do: give hookpoint= one of them." if inside else ""
        raise CheckpointError(
            f"{folder} holds no sparse autoencoder; expected {CONFIG} and {' or '.join(WEIGHTS.values())}.{hint}"
        )
    fields, tensors = read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS[found[0]])
    try:
        cfg, named = (_from_sparsify if found[0] == "sparsify" else _from_saelens)(fields, tensors)
    except KeyError as error:
        raise CheckpointError(
            f"{folder} lacks {error} in {CONFIG} or {WEIGHTS[found[0]]}, which {found[0]} writes. Download it again."
        ) from error
    sae = SparseAutoencoder(cfg)
    _check(named, sae, folder)
    sae.load_state_dict(named, assign=True)
    return sae.to(device, dtype).requires_grad_(False)


def save_sae(sae: SparseAutoencoder, folder: str | os.PathLike[str], *, file_format: FileFormat = "sparsify") -> None:
    """Write a sparse autoencoder that `load_sae` and the named library read; the folder is made if it is not there.

    sparsify's format has TopK only; SAELens's has all kinds. One folder holds one autoencoder: what another format left there
    is removed. Nothing half-written stays. Raises `CheckpointError` for a
    kind that the format does not have.

    >>> import tempfile
    >>> sae = SparseAutoencoder(SAEConfig(d_in=4, d_sae=16, k=2, hook="blocks.2.hook_resid_post")).reset(seed=0)
    >>> with tempfile.TemporaryDirectory() as where:
    ...     save_sae(sae, where)
    ...     load_sae(where).cfg == sae.cfg
    True
    """
    one_of(file_format, WEIGHTS, "file_format", error=CheckpointError)
    if file_format == "sparsify" and sae.cfg.kind != "topk":
        raise CheckpointError(
            f"sparsify's files hold TopK autoencoders, and this one is of kind {sae.cfg.kind!r}. Give file_format='saelens'."
        )
    fields, tensors = (_to_sparsify if file_format == "sparsify" else _to_saelens)(sae)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS[file_format], tensors)
    write_json(folder / CONFIG, fields)
    for other in set(WEIGHTS.values()) - {WEIGHTS[file_format]}:  # of an autoencoder that was here before
        (folder / other).unlink(missing_ok=True)


def _covers(fields: Mapping[str, Any], covered: Mapping[str, tuple[Any, ...]]) -> None:
    for field, values in covered.items():
        if field in fields and fields[field] not in values:
            raise CheckpointError(
                f"{CONFIG} has {field}={fields[field]!r}; expected {' or '.join(map(repr, values))}. This kind of "
                "autoencoder is not computed here."
            )


def _from_sparsify(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[SAEConfig, dict[str, Tensor]]:
    _covers(fields, _SPARSIFY_COVERS)
    weight = tensors["encoder.weight"]
    cfg = SAEConfig(
        d_in=fields["d_in"],
        d_sae=fields.get("num_latents") or weight.shape[0],  # 0 means d_in * expansion_factor
        k=fields["k"],
        hook=fields.get("hook"),
        model_name=fields.get("model_name"),
        training=fields.get(TRAINING) or {},
    )
    return cfg, {name: tensors[name] for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")}


def _to_sparsify(sae: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cfg = sae.cfg
    fields = {
        "activation": "topk",
        "expansion_factor": max(cfg.d_sae // cfg.d_in, 1),
        "normalize_decoder": True,
        "num_latents": cfg.d_sae,
        "k": cfg.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": cfg.d_in,
        "hook": cfg.hook,
        "model_name": cfg.model_name,
    }
    return fields | _training(cfg), dict(sae.state_dict())


def _training(cfg: SAEConfig) -> dict[str, Any]:
    return {TRAINING: dict(cfg.training)} if cfg.training else {}


def _from_saelens(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[SAEConfig, dict[str, Tensor]]:
    _covers(fields, _SAELENS_COVERS)
    about = fields.get("metadata") or {}
    kind = _SAELENS_KINDS[fields["architecture"]]
    W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    if fields.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    if fields.get("apply_b_dec_to_input") is False:
        b_enc = b_enc + b_dec @ W_enc
    named = {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if kind in WITH_THRESHOLD:
        named["threshold"] = tensors["threshold"].expand(fields["d_sae"]).contiguous()
    cfg = SAEConfig(
        d_in=fields["d_in"],
        d_sae=fields["d_sae"],
        kind=kind,
        k=int(fields["k"]) if fields.get("k") is not None else None,
        hook=about.get("hook_name"),
        model_name=about.get("model_name"),
        groups=tuple(fields.get("matryoshka_widths") or ()),
        training=about.get(TRAINING) or {},
    )
    return cfg, named


def _to_saelens(sae: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cfg = sae.cfg
    names = {kind: name for name, kind in _SAELENS_KINDS.items()}
    fields: dict[str, Any] = {
        "architecture": names[cfg.kind],
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": str(sae.b_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": cfg.hook, "model_name": cfg.model_name, **_training(cfg)},
    }
    if cfg.k is not None:
        fields["k"] = cfg.k
    if cfg.groups:
        fields["matryoshka_widths"] = list(cfg.groups)
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return fields, tensors if sae.threshold is None else {**tensors, "threshold": sae.threshold}


def _check(named: Mapping[str, Tensor], sae: SparseAutoencoder, folder: Path) -> None:
    for name, expected in sae.state_dict().items():
        if named[name].shape != expected.shape:
            raise CheckpointError(
                f"{name} in {folder} has shape {list(named[name].shape)}; expected {list(expected.shape)} from {CONFIG}."
            )
        if not bool(cast("Tensor", named[name]).isfinite().all()):
            raise CheckpointError(f"{name} in {folder} has NaN or infinite numbers. Download or save it again.")
