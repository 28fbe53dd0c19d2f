// The AI SDK against a real server process: its OpenAI provider (responses and chats) and its Anthropic provider.
// Run by `make test-npm`; NARROWS is the command to start.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { after, before, describe, test } from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const name = "narrows-demo";
const person = z.object({ name: z.enum(["Ann", "Bob"]), tall: z.boolean() }).strict();
const models = {};
let server;

before(async () => {
  const flags = ["serve", name, "--tp", "1", "--port", "0", "--api-key", "secret", "--tool-call-parser", "hermes"];
  server = spawn(process.env.NARROWS ?? "narrows", flags, { stdio: ["ignore", "pipe", "inherit"] });
  const url = await new Promise((resolve, reject) => {
    let said = "";
    server.stdout.on("data", (data) => {
      said += data;
      const found = said.match(/ready at (http:\S+) /);
      if (found) resolve(found[1]);
    });
    server.on("exit", (code) => reject(new Error(`the server ended with ${code}: ${said}`)));
  });
  const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "secret" });
  const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "secret" });
  Object.assign(models, { responses: openai.responses(name), chat: openai.chat(name), messages: anthropic(name) });
});

after(async () => {
  const ended = new Promise((resolve) => server.on("exit", resolve));
  server.kill("SIGTERM");
  assert.equal(await ended, 0);
});

for (const api of ["responses", "chat", "messages"]) {
  describe(api, () => {
    test("a text and its stream", async () => {
      const ask = { model: models[api], prompt: "Hello", temperature: 0, maxOutputTokens: 16, maxRetries: 0 };
      const whole = await generateText(ask);
      assert(whole.text.length > 0 && whole.usage.outputTokens <= 16);
      const stream = streamText(ask);
      let text = "";
      for await (const piece of stream.textStream) text += piece;
      assert.equal(text, whole.text);
      assert.equal(await stream.finishReason, whole.finishReason);
    });

    test("an object", async () => {
      const ask = { model: models[api], prompt: "Who?", maxOutputTokens: 200, maxRetries: 0 };
      const { output } = await generateText({ ...ask, output: Output.object({ schema: person }) });
      assert(person.safeParse(output).success);
    });

    test("a tool that has to be called, and its result", async () => {
      const seen = [];
      const add = tool({
        description: "Adds somebody.",
        inputSchema: person,
        execute: async (input) => {
          seen.push(input);
          return "done";
        },
      });
      const ask = { model: models[api], prompt: "Add somebody.", maxOutputTokens: 200, maxRetries: 0, tools: { add } };
      const named = { type: "tool", toolName: "add" }; // one call; several might not end within the limit
      const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? named : "none" });
      const { steps } = await generateText({ ...ask, prepareStep, stopWhen: stepCountIs(2) });
      assert.equal(steps.length, 2);
      assert(seen.length === 1 && person.safeParse(seen[0]).success);
      const stream = streamText({ ...ask, toolChoice: named });
      const calls = await stream.toolCalls;
      assert(calls.length === 1 && person.safeParse(calls[0].input).success);
    });
  });
}
