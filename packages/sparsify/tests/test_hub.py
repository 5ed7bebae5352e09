"""Publishing, with huggingface_hub's own client against a real HTTP server that keeps repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from small import Tiny, token_rows

from sparsify import FormatError, Sae, SaeConfig, SparseCoder, TrainConfig, Trainer, convert, evaluate, push_to_hub
from sparsify._card import card


class Hub(BaseHTTPRequestHandler):
    """The few calls of the Hub's API that creating, committing and downloading make."""

    failing = None  # the status with which the README is answered
    repos: dict  # {id: {"private": bool, "branches": {name: {path: bytes}}}}
    commits: list

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        data = self.body()
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(401, {"error": "no"})
        elif self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.repos:
                self.answer(409, {"error": "exists", "url": name})
                return
            self.repos[name] = {
                "private": asked.get("private") or asked.get("visibility") == "private",
                "branches": {"main": {}},
            }
            self.answer(200, {"url": f"{self.server.url}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/branch/(\w+)", self.path):
            self.repos[match[1]]["branches"][match[2]] = dict(self.repos[match[1]]["branches"]["main"])
            self.answer(200, {})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/(\w+)", self.path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(data)["files"]
            ]
            self.answer(200, {"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(\w+)", self.path.split("?")[0]):
            header, *changes = [json.loads(line) for line in data.splitlines()]
            for change in changes:
                value = change["value"]
                self.repos[match[1]]["branches"][match[2]][value["path"]] = base64.b64decode(value["content"])
            self.commits.append((match[1], match[2], header["value"]["summary"]))
            url = f"{self.server.url}/{match[1]}/commit/abc"
            self.answer(200, {"commitOid": "a" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self):
        path = self.path.split("?")[0]
        if self.failing and path.endswith("README.md"):
            self.answer(self.failing, {"error": "busy"})
        elif match := re.fullmatch(r"/api/models/(.+)/tree/(\w+)", path):
            files = self.repos[match[1]]["branches"]["main"]
            listed = [{"type": "file", "path": n, "size": len(d), "oid": "b" * 40} for n, d in files.items()]
            self.answer(200, listed)
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(\w+))?", path):
            repo = self.repos.get(match[1])
            if repo is None:
                self.answer(404, {"error": "no repo"}, X_Error_Code="RepoNotFound")
                return
            files = repo["branches"]["main"]
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": match[1], "sha": "a" * 40, "siblings": siblings, "private": False, "tags": []})
        elif match := re.fullmatch(r"/(.+)/resolve/(\w+)/(.+)", path):
            branches = self.repos.get(match[1], {}).get("branches")
            if branches is None:
                self.answer(404, {}, X_Error_Code="RepoNotFound")
                return
            revision = "main" if match[2] == "a" * 40 else match[2]
            if revision not in branches:
                self.answer(404, {}, X_Error_Code="RevisionNotFound")
            elif match[3] not in branches[revision]:
                self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit="a" * 40)
            else:
                content = branches[revision][match[3]]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(200, content, ETag=etag, X_Repo_Commit="a" * 40)
        else:
            self.answer(404, {"error": path})

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch):
    # Other members' tests switch the client off; the stand-in is on this very machine.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    handler = type("Handler", (Hub,), {"repos": {}, "commits": []})
    server = ThreadingHTTPServer(("localhost", 0), handler)
    server.url = f"http://localhost:{server.server_port}"
    server.handler = handler
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path):
    cfg = TrainConfig(SaeConfig(k=4, num_latents=48), batch_size=8, hookpoints=["layers.[01]"], save_dir=str(tmp_path))
    trainer = Trainer(
        cfg, token_rows(), Tiny(), recipe={"model": "/home/someone/secret/tiny", "dataset": "org/stories"}
    )
    trainer.fit()
    evaluate(Tiny(), trainer.saes, token_rows()).save(trainer.folder / "eval.json")
    return trainer.folder


def push(hub, run, **options):
    return push_to_hub(run, "me/sae-tiny", endpoint=hub.url, token="hf_right", **options)


def test_one_commit_holds_the_coders_and_the_card(hub, run):
    done = push(hub, run, private=True, license="mit")
    repo = hub.handler.repos["me/sae-tiny"]
    files = repo["branches"]["main"]
    expected = [f"layers.{i}/{name}" for i in (0, 1) for name in ("cfg.json", "sae.safetensors")]
    assert sorted(files) == sorted([*expected, "README.md", "config.json", "eval.json"])
    assert {name: len(data) for name, data in files.items()} == done.files
    assert hub.handler.commits == [("me/sae-tiny", "main", "Upload 2 sparse coders")]
    assert repo["private"]
    assert (done.readme, done.commit_url) == ("written", f"{hub.url}/me/sae-tiny/commit/abc")
    assert files["layers.1/sae.safetensors"] == (run / "layers.1" / "sae.safetensors").read_bytes()

    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: sparsify\n")
    assert "license: mit" in card
    assert "- org/stories" in card
    fvu = json.loads((run / "eval.json").read_text())["reconstruction"]["layers.1"]["fvu"]
    assert f"| `layers.1` | topk | 12 | 48 | 12 | 4 | {fvu:.4f} |" in card
    assert 'Sae.load_from_hub("me/sae-tiny", hookpoint="layers.0")' in card
    assert "KL(clean ‖ grafted)" in card
    assert b"secret" not in b"".join(files.values())
    assert str(run.parent).encode() not in b"".join(files.values())


def test_what_was_pushed_can_be_loaded(hub, run, monkeypatch, tmp_path):
    push(hub, run)
    from functools import partial

    from huggingface_hub import snapshot_download

    there = partial(snapshot_download, endpoint=hub.url, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("sparsify._files.snapshot_download", there)
    mine, theirs = Sae.load_from_disk(run / "layers.1"), Sae.load_from_hub("me/sae-tiny", hookpoint="layers.1")
    assert torch.equal(mine.W_dec, theirs.W_dec)
    assert list(Sae.load_many("me/sae-tiny")) == ["layers.0", "layers.1"]
    with pytest.raises(FormatError, match=r"no hookpoint 'layers.7'"):
        Sae.load_from_hub("me/sae-tiny", hookpoint="layers.7")


def test_a_hand_written_readme_is_never_overwritten(hub, run):
    push(hub, run)
    files = hub.handler.repos["me/sae-tiny"]["branches"]["main"]
    files["README.md"] = b"# Mine\nwritten by hand\n"
    assert push(hub, run).readme == "kept"
    assert files["README.md"] == b"# Mine\nwritten by hand\n"
    files["README.md"] = b"# Mine\n<!-- sparsify: begin -->old<!-- sparsify: end -->\nmy notes\n"
    assert push(hub, run).readme == "written"
    text = files["README.md"].decode()
    assert text.startswith("# Mine\n<!-- sparsify: begin -->")
    assert text.endswith("<!-- sparsify: end -->\nmy notes\n")
    assert "old" not in text.split("Hookpoints")[0]


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_readme_that_cannot_be_read_stops_the_push(hub, run, status, monkeypatch):
    push(hub, run)
    files = hub.handler.repos["me/sae-tiny"]["branches"]["main"]
    files["README.md"] = b"# Mine\n"
    before, hub.handler.failing = dict(files), status
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits before it asks again
    with pytest.raises(FormatError, match="may be written by hand, so nothing was uploaded") as error:
        push(hub, run)
    assert str(status) in str(error.value)
    assert len(hub.handler.commits) == 1
    assert files == before


CARDS = {
    "topk": ({}, {"EleutherAI", "SAELens", "dictionary_learning"}),
    "groupmax": ({"activation": "groupmax"}, {"EleutherAI"}),
    "batchtopk": ({"activation": "batchtopk"}, {"SAELens", "dictionary_learning", "circuit-tracer"}),
    "jumprelu": ({"activation": "jumprelu"}, {"SAELens", "dictionary_learning", "circuit-tracer"}),
    "gated": ({"activation": "gated"}, {"SAELens", "dictionary_learning"}),
    "topk transcoder": ({"transcode": True}, {"EleutherAI"}),
    "jumprelu transcoder": ({"transcode": True, "activation": "jumprelu"}, {"SAELens", "circuit-tracer"}),
    "skip autoencoder": ({"skip_connection": True}, {"EleutherAI"}),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card_names_the_libraries_that_can_hold_the_coder(tmp_path, name):
    options, expected = CARDS[name]
    coder = SparseCoder(6, SaeConfig(k=4, num_latents=48, **options))
    if coder.cfg.activation == "batchtopk":
        coder.threshold.fill_(0.5)
    hook = "layers.0.mlp"
    text = card("me/sae", {hook: coder}, {"model": "org/modèle", "sae": {"k": 4, "tied": False}}, {}, None)
    assert {n for n in ("EleutherAI", "SAELens", "dictionary_learning", "circuit-tracer") if n in text} == expected
    assert "1 transcoder on" in text if coder.cfg.transcode else "1 sparse autoencoder on" in text
    assert "sae:\n  k: 4\n  tied: false" in text
    assert "modèle" in text.split("---")[1]
    for line in re.findall(r"convert\.save\(.*\)", text):  # every snippet runs as it stands
        layout = re.search(r'"(\w+)", "\1"', line)[1]
        metadata = eval(line[line.index("metadata=") + 9 : -1]) if "metadata=" in line else None
        convert.save({hook: coder}, tmp_path / layout, layout, metadata=metadata)


def test_wide_transcoders_are_not_for_eleutherais_package():
    coder = SparseCoder(6, SaeConfig(k=4, num_latents=48, transcode=True), d_out=9)
    assert "EleutherAI" not in card("me/sae", {"layers.0": coder}, {}, {}, None)


def test_branches_and_dry_runs(hub, run):
    plan = push(hub, run, dry_run=True)
    assert hub.handler.repos == {}
    assert plan.commit_url is None
    assert plan.files["layers.0/sae.safetensors"] == (run / "layers.0" / "sae.safetensors").stat().st_size
    push(hub, run, revision="v2")
    branches = hub.handler.repos["me/sae-tiny"]["branches"]
    assert not branches["main"]
    assert "README.md" in branches["v2"]


def test_refusals(hub, run, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(FormatError, match=r"holds no coder"):
        push(hub, tmp_path / "none")
    with pytest.raises(FormatError, match="the Hub refuses the upload to me/sae-tiny"):
        push_to_hub(run, "me/sae-tiny", endpoint=hub.url, token="hf_wrong")
    for name, endpoint in [("bad name/x/y", hub.url), ("me/sae-tiny", "http://localhost:9")]:
        with pytest.raises(FormatError, match=f"the README of {name} cannot be read"):
            push_to_hub(run, name, endpoint=endpoint, token="hf_right")
    weights = run / "layers.1" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FormatError, match="torn"):
        push(hub, run)
    assert not hub.handler.commits
