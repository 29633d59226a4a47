// Child program: what a product team does with OpenAI's SDK for Node.
//
//     node openai_calls.mjs CLIENT_FOLDER URL KEY PNG_FILE MASK_FILE
import { createHash } from "node:crypto";
import { createReadStream, readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [folder, url, key, picture, mask] = process.argv.slice(2);
const require = createRequire(`${folder}/package.json`);
const { default: OpenAI, toFile } = require("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });

const digest = (text) =>
  createHash("sha256").update(Buffer.from(text, "base64")).digest("hex");

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return {
      class: error.constructor.name,
      code: error.code,
      param: error.param ?? null,
      requestId: error.requestID,
    };
  }
  return {};
}

async function events(stream) {
  const found = [];
  for await (const event of await stream) {
    found.push({ type: event.type, digest: digest(event.b64_json) });
  }
  return found;
}

const plain = await client.images.generate({
  model: "gpt-image-1", prompt: "a fox", n: 2, seed: 7,
});
const edited = await client.images.edit({
  image: [createReadStream(picture), await toFile(readFileSync(picture), "b.png")],
  mask: createReadStream(mask),
  prompt: "a cat",
  seed: 7,
});
const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(JSON.stringify({
  pictures: plain.data.map((image) => digest(image.b64_json)),
  usage: plain.usage.total_tokens,
  edit: digest(edited.data[0].b64_json),
  models,
  stream: await events(client.images.generate({
    prompt: "a fox", stream: true, partial_images: 2, seed: 7,
  })),
  editStream: await events(client.images.edit({
    image: createReadStream(picture), prompt: "a cat", stream: true, partial_images: 1,
  })),
  refusals: [
    await refusal(() => client.images.generate({ prompt: "something forbidden" })),
    await refusal(() => client.images.generate({ prompt: "a fox", size: "1x1" })),
    await refusal(() => client.images.generate({ prompt: "a fox", model: "midjourney" })),
    await refusal(() => events(
      client.images.generate({ prompt: "something forbidden", stream: true }))),
  ],
}));
