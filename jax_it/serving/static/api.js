// The server's API, as far as the page needs it.

/** An error that the server or the connection reports; `status` is 0 for the latter. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Sends a request and returns the response. Throws ApiError, and AbortError after `signal`. */
async function request(path, key, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body) {
    headers["Content-Type"] = "application/json";
    options.method = "POST";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const message = found?.error?.message ?? `The server answered with status ${response.status}`;
  throw new ApiError(wait ? `${message} (try again in ${wait} s)` : message, response.status);
}

export async function listModels(key) {
  return (await (await request("v1/models", key)).json()).data;
}

export async function renderTemplate(key, model, template, fields) {
  return (await (await request("render", key, { model, template, fields })).json()).prompt;
}

/** Yields the objects of a streamed answer. Throws ApiError for an answer that ends with an error, or not at all. */
export async function* stream(path, key, body, signal) {
  const response = await request(path, key, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      break;
    }
    if (part.done) break;
    const lines = (buffered + part.value).split("\n");
    buffered = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue; // a comment, or the blank line that ends an event
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new ApiError(object.error.message, response.status);
      yield object;
    }
  }
  throw new ApiError("The connection ended before the answer did.", 0);
}
