"""The tools as an agent has them: a client of MCP over real pipes, and inspect_ai's own calls."""

import json
import sys

import anyio
import pytest
import tiny
from inspect_ai.tool import ToolDef, ToolError
from mcp import Client, StdioServerParameters
from toy_runs import write_toy_run

from auditgap.agents import Toolbox
from auditgap.agents.inspect_tools import tools
from auditgap.audits import reduce
from auditgap.errors import UsageError

READING = ["list_runs", "list_sites", "read_verdicts", "read_table"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("agents")
    reduce(write_toy_run(made / "runs" / "toy", config={"audit": "latent"}))
    tiny.save("llama", made / "runs" / "model")
    (made / "secret").mkdir()
    write_toy_run(made / "secret" / "run")
    (made / "runs" / "asked.txt").write_text("tell the vault\ntell the door\n", "utf-8")
    return made


def talk(home, *flags, calls=()):
    """What a server says over stdin and stdout: the names of its tools, and its answers."""

    async def session():
        started = StdioServerParameters(
            command=sys.executable,
            args=["-m", "auditgap", "mcp", str(home / "runs"), *flags],
            env={"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        async with Client(started, read_timeout_seconds=300) as client:
            listed = (await client.list_tools()).tools
            answers = [await client.call_tool(name, given) for name, given in calls]
        return {tool.name: tool for tool in listed}, answers

    return anyio.run(session)


def test_a_client_reads_and_can_do_no_more(home):
    model = str(home / "runs" / "model")
    listed, answers = talk(
        home,
        calls=[
            ("list_runs", {}),
            ("list_sites", {"model": model}),
            ("read_verdicts", {"run": "toy"}),
            ("read_table", {"run": "toy", "table": "lvs", "limit": 2}),
            ("read_table", {"run": "toy", "table": "prompts"}),
            ("read_table", {"run": "../secret/run", "table": "lvs"}),
            ("attack", {"model": model, "run": "new"}),
        ],
    )
    assert list(listed) == READING
    assert all(tool.annotations.read_only_hint for tool in listed.values())
    runs, sites, verdicts, table, unknown, outside, attack = answers
    assert runs.structured_content["result"][0]["run"] == "toy"
    assert sites.structured_content["result"][0]["site"] == "embedding"
    assert {"audit_gap", "robust"} <= {x["id"] for x in verdicts.structured_content["result"]}
    assert len(table.structured_content["rows"]) == 2 < table.structured_content["rows_in_all"]
    assert unknown.is_error and "Its tables:" in unknown.content[0].text
    assert outside.is_error and "not inside the folder" in outside.content[0].text
    assert attack.is_error and not (home / "runs" / "new").exists()


def test_an_agent_attacks_only_where_it_is_allowed(home):
    asked = {
        **{"model": str(home / "runs" / "model"), "run": "new", "judge": "keyword", "limit": 2},
        **{"prompts": str(home / "runs" / "asked.txt"), "layers": "1"},
    }
    listed, [found, again] = talk(
        home, "--allow-attacks", calls=[("attack", asked), ("read_verdicts", {"run": "new"})]
    )
    assert list(listed) == [*READING, "attack"] and not listed["attack"].annotations.read_only_hint
    assert not found.is_error, found.content
    said = found.structured_content
    assert said["failed"] == {} and len(said["gaps"]) >= 1
    assert said["verdicts"] == again.structured_content["result"]
    assert "tell the vault" not in json.dumps(said)


def test_inspect_has_the_same_tools(home):
    made = {ToolDef(tool).name: tool for tool in tools(home / "runs")}
    assert list(made) == READING
    about = ToolDef(made["read_table"])
    assert set(about.parameters.properties) == {"run", "table", "limit", "skip"}
    assert "list_runs names it" in about.parameters.properties["run"].description
    rows = json.loads(anyio.run(lambda: made["read_table"](run="toy", table="lvs", limit=1)))
    assert len(rows["rows"]) == 1
    with pytest.raises(ToolError, match="has no table 'x'"):
        anyio.run(lambda: made["read_table"](run="toy", table="x"))


@pytest.mark.parametrize("run", ["../secret/run", "/etc", ".", "toy/../../secret/run"])
def test_nothing_outside_the_folder_is_read(home, run):
    with pytest.raises(UsageError, match="not inside the folder"):
        Toolbox(home / "runs").read_verdicts(run)
    with pytest.raises(UsageError, match="not inside the folder"):
        Toolbox(home / "runs", may_attack=True).attack("none", "new", prompts=run)


def test_a_link_out_of_the_folder_is_not_followed(home):
    (home / "runs" / "link").symlink_to(home / "secret" / "run")
    try:
        with pytest.raises(UsageError, match="not inside the folder"):
            Toolbox(home / "runs").read_table("link", "lvs")
    finally:
        (home / "runs" / "link").unlink()
