// SPDX-License-Identifier: Apache-2.0
// node node.mjs ARTIFACT PROMPT OUT.ppm [--noise FILE] [--web]: a picture by onnxruntime-node, or by onnxruntime-web.
// FILE holds the first noise as float32, so that the picture can be compared; without it noise is drawn.
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { draw, noise } from "./draw.mjs";

const [folder, prompt, out, ...options] = process.argv.slice(2);
const web = options.includes("--web");
const from = createRequire(path.join(process.cwd(), "package.json")); // packages are those of the folder one is in
const entry = from.resolve(web ? "onnxruntime-web" : "onnxruntime-node");
const found = await import(pathToFileURL(entry).href);
const ort = found.default ?? found;
if (web) ort.env.wasm.numThreads = 1;

const readJson = async (file) => JSON.parse(await readFile(path.join(folder, file), "utf8"));
// No arena and no planned block: what is decoded for one layer is given back. Errors only: each codebook layer's weights
// are inputs with a default, of which the runtime would tell with a line each.
const options_ = { enableCpuMemArena: false, enableMemPattern: false, logSeverityLevel: 3, executionProviders: [web ? "wasm" : "cpu"] };
const session = async (name, spec) => {
  const file = path.join(folder, spec.file);
  if (!web) return ort.InferenceSession.create(file, options_);
  const weights = await readFile(path.join(folder, spec.data));
  const externalData = [{ path: path.basename(spec.data), data: new Uint8Array(weights) }];
  return ort.InferenceSession.create(new Uint8Array(await readFile(file)), { ...options_, externalData });
};

let normal = noise;
const at = options.indexOf("--noise");
if (at >= 0) {
  const bytes = await readFile(options[at + 1]);
  const given = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  let taken = 0;
  normal = (count) => given.slice(taken, (taken += count));
}
const { width, height, rgb } = await draw({ ort, readJson, session, prompt, normal });
await writeFile(out, Buffer.concat([Buffer.from(`P6\n${width} ${height}\n255\n`), rgb]));
