"use strict";
// What both pages use: elements whose text is only ever set as text, and answers of the server.

const $ = (id) => document.getElementById(id);

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** The response to a request. Throws an Error with what the server says, where it is not one. */
async function answered(path, options) {
  const response = await fetch(path, options);
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Error(answer?.error?.message ?? `the server answered ${response.status}`);
}

async function json(path) {
  return (await answered(path)).json();
}
