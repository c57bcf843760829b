"""The drafts of docs/extending.md apply to the package as it is, and what they add works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "extending.md"
DIFFS = re.findall(r"```diff\n(.*?)```", DOCUMENT.read_text(), re.S)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with every draft applied."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, and applies the drafts")
    copy = tmp_path_factory.mktemp("extended")
    for name in ("opd_megatron", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "docs").mkdir()
    shutil.copy(ROOT / "docs/objectives.md", copy / "docs")
    for diff in DIFFS:
        applied = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", "-"],
            input=diff,
            cwd=copy,
            capture_output=True,
            text=True,
            check=False,
        )
        assert applied.returncode == 0, applied.stderr
    return copy


def _runs(extended: Path, code: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(extended)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=extended, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_document_has_a_draft_of_each_kind() -> None:
    files = [re.findall(r"^\+\+\+ b/(\S+)", diff, re.M) for diff in DIFFS]
    assert [names[-1].split("/")[1] for names in files] == ["losses", "teacher", "weight_sync", "rollout", "weights"]


def test_a_new_divergence_is_trained_by_name_and_its_key_belongs_to_it(extended: Path) -> None:
    _runs(
        extended,
        """
import torch
from opd_megatron.config import load_config
from opd_megatron.errors import ConfigError
from opd_megatron.losses import linear_divergence_terms, vocab_parallel_divergence
from opd_megatron.losses.objectives import loss_arguments, objective_terms
from opd_megatron.losses.reference import dense_divergence
from opd_megatron.types import Batch

p, q = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
expected = dense_divergence(p, [q], "jsd_le_cam", le_cam_share=0.3)
torch.testing.assert_close(vocab_parallel_divergence(p, q, type="jsd_le_cam", le_cam_share=0.3), expected)

objective = load_config(None, ["objective.type=jsd_le_cam", "objective.le_cam_share=0.3"]).objective
tokens = torch.zeros(1, 5, dtype=torch.int64)
batch = Batch(tokens, tokens, torch.ones(1, 5))
arguments = loss_arguments(objective_terms(objective), batch, batch.weights > 0)
eye = torch.eye(11, dtype=torch.float64)
terms = linear_divergence_terms(p, eye, [(q, eye)], **arguments)
torch.testing.assert_close(terms.divergence, expected)
try:
    load_config(None, ["objective.type=gkd", "objective.le_cam_share=0.3"])
except ConfigError as error:
    assert "objective.le_cam_share=0.3 has no effect" in str(error) and "jsd_le_cam" in str(error), error
else:
    raise SystemExit("a key of another type was accepted")
""",
    )


def test_a_new_teacher_is_chosen_by_its_placement_and_feeds_the_loss_unopened(extended: Path) -> None:
    _runs(
        extended,
        """
import http.server, json, threading
import torch
from opd_megatron.config import CompletionsTeacherConfig, load_config
from opd_megatron.losses import linear_divergence_terms
from opd_megatron.teacher import PLACEMENTS
from opd_megatron.teacher.completions import CompletionsTeacher
from opd_megatron.types import Batch

class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        best = [{str((token + i) % 11): {"logprob": -1.0 - i} for i in range(asked["prompt_logprobs"] + 1)}
                for token in asked["prompt"]]
        body = json.dumps({"choices": [{"prompt_logprobs": [None, *best[1:]]}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
entry = ["teachers.0.path=t", "teachers.0.placement=completions", "teachers.0.top_k=3"]
(config,) = load_config(None, [*entry, f"teachers.0.url=http://127.0.0.1:{server.server_port}"]).teachers
assert isinstance(config, CompletionsTeacherConfig) and type(config) in PLACEMENTS
teacher = CompletionsTeacher(config, True, 1.0)
tokens = torch.arange(12).view(2, 6) % 11
weights = torch.zeros(2, 6)
weights[0, 2:5] = weights[1, 1:3] = 1
batch = Batch(tokens, tokens.roll(-1, 1), weights)
teacher.submit([batch])
(output,) = teacher.collect().outputs
teacher.close()
assert output.ids[:, 0].tolist() == batch.targets[weights > 0].tolist()
terms = linear_divergence_terms(torch.randn(5, 4), torch.randn(11, 4), [output], type="reverse_kl")
assert terms.loss_sum.isfinite()
""",
    )


def test_a_new_way_of_weight_sync_carries_every_tensor(extended: Path) -> None:
    _runs(
        extended,
        """
import tempfile
from pathlib import Path
from types import SimpleNamespace
import torch
from safetensors.torch import load_file
from opd_megatron.weight_sync.format import WeightFolder, WeightFormat
from opd_megatron.weight_sync.publisher import WeightPublisher

folder = Path(tempfile.mkdtemp()) / "weights"
publisher = WeightPublisher(
    SimpleNamespace(), WeightFormat(torch.float32, folder=folder), None, bucket_bytes=1, on_event=print
)
weights = {name: torch.randn(3) for name in "abc"}
publisher._gathered = lambda: iter([[("a", weights["a"])], [("b", weights["b"]), ("c", weights["c"])]])
assert list(publisher.stream()) == [WeightFolder(folder)]
found = {name: value for file in folder.iterdir() for name, value in load_file(file).items()}
assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
""",
    )


def test_a_new_engine_is_chosen_by_its_name_samples_and_takes_weights(extended: Path) -> None:
    _runs(
        extended,
        """
import http.server, json, tempfile, threading
from pathlib import Path
from types import SimpleNamespace
import torch
from opd_megatron.config import load_config
from opd_megatron.rollout import RolloutClient, RolloutEngine, build_engine, weight_format
from opd_megatron.types import Prompt, SampleRequest, Sampling
from opd_megatron.weight_sync.publisher import WeightPublisher

asked = []

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked.append((self.path, body))
        if self.path == "/generate":
            seeds = [each["sampling_seed"] for each in body["sampling_params"]]
            self.answer([{"meta_info": {"output_token_logprobs": [[-0.5, seed, None], [-1.5, 3, None]],
                                        "finish_reason": {"type": "stop"}}} for seed in seeds])
        else:
            self.answer({"success": True, "files": len(list(Path(body["model_path"]).iterdir()))})
    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
folder = Path(tempfile.mkdtemp()) / "run"
folder.mkdir()
config = load_config(None, ["rollout.engine=sglang", f"rollout.url=http://127.0.0.1:{server.server_port}",
                            f"output_dir={folder}", "rollout.dtype=fp32"])
takes = weight_format(config, None)
publisher = WeightPublisher(SimpleNamespace(), takes, None, bucket_bytes=1, on_event=print)
publisher._gathered = lambda: iter([[("a", torch.ones(3))], [("b", torch.ones(2))]])
engine = build_engine(config, folder, 64, folder / "log")
assert isinstance(engine, RolloutEngine)
client = RolloutClient({0: engine}, 1, publisher.stream, None, max_restarts=0, on_event=print)
client.start(4)
assert asked == [("/update_weights_from_disk", {"model_path": str(takes.folder), "flush_cache": True})]
requests = [SampleRequest(Prompt("p", (1, 2), ""), seed=seed, group=seed) for seed in (7, 8)]
rollouts = client.sample(requests, Sampling(max_new_tokens=5))
assert [(r.response_ids.tolist(), r.policy_version, r.finish_reason) for r in rollouts] == [
    ([7, 3], 4, "stop"), ([8, 3], 4, "stop")]
""",
    )


def test_a_new_family_describes_every_tensor_of_its_model(extended: Path) -> None:
    _runs(
        extended,
        """
from transformers import AutoModelForCausalLM
from opd_megatron.weights.sharding import hf_shapes
from tests.weights.checkpoints import config_of

config = config_of("seed_oss")
model = AutoModelForCausalLM.from_config(config)
expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
assert {name: tuple(shape) for name, shape in hf_shapes(config).items()} == expected
""",
    )
