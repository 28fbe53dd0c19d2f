// OpenAI's npm client against a real server process: what its users call, on the demo model over two ranks.
// Run by `make test-npm`; NARROWS is the command to start.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { after, before, test } from "node:test";
import OpenAI from "openai";

const model = "narrows-demo";
const prompt = "The sea was";
const schema = {
  type: "object",
  properties: { name: { type: "string", maxLength: 8 }, age: { type: "integer", maximum: 99 } },
  required: ["name", "age"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "add", parameters: schema } }];
let server, client, url;

before(async () => {
  const flags = ["serve", model, "--tp", "2", "--port", "0", "--api-key", "secret", "--tool-call-parser", "hermes"];
  server = spawn(process.env.NARROWS ?? "narrows", flags, { stdio: ["ignore", "pipe", "inherit"] });
  url = await new Promise((resolve, reject) => {
    let said = "";
    server.stdout.on("data", (data) => {
      said += data;
      const found = said.match(/ready at (http:\S+) /);
      if (found) resolve(found[1]);
    });
    server.on("exit", (code) => reject(new Error(`the server ended with ${code}: ${said}`)));
  });
  client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "secret", maxRetries: 0 });
});

after(async () => {
  const ended = new Promise((resolve) => server.on("exit", resolve));
  server.kill("SIGTERM");
  assert.equal(await ended, 0);
});

test("models", async () => {
  const names = [];
  for await (const found of client.models.list()) names.push(found.id);
  assert.deepEqual(names, [model]);
});

test("a completion and its stream are the same text, with usage", async () => {
  const ask = { model, prompt, max_tokens: 20, temperature: 0 };
  const whole = await client.completions.create(ask);
  let text = "";
  let usage = null;
  for await (const chunk of await client.completions.create({
    ...ask, stream: true, stream_options: { include_usage: true },
  })) {
    text += chunk.choices[0]?.text ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].text);
  assert.deepEqual(usage, whole.usage);
  const scored = await client.completions.create({ ...ask, max_tokens: 0, echo: true, logprobs: 1 });
  assert.equal(scored.choices[0].text, prompt);
  assert.equal(scored.choices[0].logprobs.token_logprobs[0], null);
});

test("a chat, its stream helper, and log-probabilities", async () => {
  const ask = { model, messages: [{ role: "user", content: "Hello" }], max_completion_tokens: 16, temperature: 0 };
  const whole = await client.chat.completions.create({ ...ask, logprobs: true, top_logprobs: 2 });
  assert.equal(whole.choices[0].logprobs.content.length, whole.usage.completion_tokens);
  const stream = client.chat.completions.stream(ask);
  assert.equal(await stream.finalContent(), whole.choices[0].message.content);
});

test("seeds repeat, texts of n differ, stop strings end", async () => {
  const ask = { model, prompt, max_tokens: 12, seed: 7, n: 3 };
  const texts = async () => (await client.completions.create(ask)).choices.map((choice) => choice.text);
  const first = await texts();
  assert.deepEqual(await texts(), first);
  assert.equal(new Set(first).size, 3);
  const { choices } = await client.completions.create({ model, prompt, max_tokens: 40, temperature: 0 });
  const stop = choices[0].text.slice(9, 13);
  const cut = await client.completions.create({ model, prompt, max_tokens: 40, temperature: 0, stop });
  assert.equal(cut.choices[0].text, choices[0].text.slice(0, choices[0].text.indexOf(stop)));
  assert.equal(cut.choices[0].finish_reason, "stop");
});

test("a schema is kept, and a tool that has to be called is", async () => {
  const messages = [{ role: "user", content: "Who?" }];
  const json = { type: "json_schema", json_schema: { name: "p", schema, strict: true } };
  const formed = await client.chat.completions.create({ model, messages, response_format: json, seed: 1, max_tokens: 150 });
  assert.deepEqual(Object.keys(JSON.parse(formed.choices[0].message.content)).sort(), ["age", "name"]);
  const stream = client.chat.completions.stream({
    model, messages, tools, tool_choice: "required", parallel_tool_calls: false, seed: 1, max_tokens: 150,
  });
  const called = await stream.finalChatCompletion();
  assert.equal(called.choices[0].finish_reason, "tool_calls");
  const [call] = called.choices[0].message.tool_calls;
  assert.equal(call.function.name, "add");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["age", "name"]);
});

test("a response, its stream, a form and a tool", async () => {
  const ask = { model, input: "Hello", max_output_tokens: 16, temperature: 0 };
  const whole = await client.responses.create(ask);
  let text = "";
  for await (const event of client.responses.stream(ask)) if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal(text, whole.output_text);
  const format = { type: "json_schema", name: "p", schema, strict: true };
  const formed = await client.responses.create({ model, input: "Who?", max_output_tokens: 150, text: { format } });
  assert.deepEqual(Object.keys(JSON.parse(formed.output_text)).sort(), ["age", "name"]);
  const tool = { type: "function", name: "add", parameters: schema, strict: true };
  const choice = { tool_choice: { type: "function", name: "add" }, tools: [tool] };
  const { output } = await client.responses.create({ model, input: "Add", max_output_tokens: 150, ...choice });
  assert.deepEqual(output.map((item) => [item.type, item.name]), [["function_call", "add"]]);
});

test("errors are those that the client knows, and an aborted stream frees its pages", async () => {
  await assert.rejects(client.completions.create({ model: "no", prompt }), OpenAI.NotFoundError);
  await assert.rejects(client.completions.create({ model, prompt, temperature: -1 }), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
  const ask = { model, prompt, max_tokens: 1500, stream: true };
  const stream = await client.completions.create(ask, { body: { ...ask, ignore_eos: true } });
  for await (const _ of stream) break;
  stream.controller.abort();
  for (let tries = 0; tries < 100; tries++) {
    const answer = await fetch(`${url}/metrics`, { headers: { Authorization: "Bearer secret" } });
    if (/^narrows_kv_pages_used 0(\.0)?$/m.test(await answer.text())) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  assert.fail("pages are still held");
});
