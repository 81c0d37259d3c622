"use strict";
// openapi.json -> a section for each operation: what it takes, what it answers.

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function table(heading, rows) {
  const cells = (tag, row) => make("tr", {}, ...row.map((each) => make(tag, {}, each)));
  return make("table", {}, make("thead", {}, cells("th", heading)), make("tbody", {}, ...rows.map((row) => cells("td", row))));
}

const code = (text) => make("code", { textContent: text });

function type(schema, schemas) {
  if (!schema) return "";
  if (schema.$ref) return type(schemas[schema.$ref.split("/").pop()], schemas);
  if (schema.anyOf) return schema.anyOf.map((each) => type(each, schemas)).join(" or ");
  if (schema.contentMediaType || schema.format === "binary") return "file";
  if (schema.type === "array") return `[${type(schema.items, schemas)}]`;
  if (schema.type === "object" && schema.properties) {
    return `{${Object.entries(schema.properties).map(([name, each]) => `${name}: ${type(each, schemas)}`).join(", ")}}`;
  }
  const range = [schema.minimum !== undefined ? `from ${schema.minimum}` : "", schema.maximum !== undefined ? `to ${schema.maximum}` : ""];
  return [schema.type ?? "any", ...range].filter(Boolean).join(" ");
}

function operation(path, method, said, schemas) {
  const section = make("section", { className: "operation" },
    make("h2", {}, code(`${method.toUpperCase()} ${path}`)), make("p", { textContent: said.description ?? said.summary ?? "" }));
  const takes = (said.parameters ?? []).map((each) =>
    [code(each.name), each.in, type(each.schema, schemas), each.required ? "required" : `default ${each.schema.default}`]);
  for (const [kind, { schema }] of Object.entries(said.requestBody?.content ?? {})) {
    const whole = schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema;
    for (const [name, each] of Object.entries(whole.properties)) {
      takes.push([code(name), kind, type(each, schemas), whole.required?.includes(name) ? "required" : `default ${each.default}`]);
    }
  }
  if (takes.length) section.append(table(["takes", "in", "type", ""], takes));
  section.append(table(["answers", "", ""], Object.entries(said.responses).map(([status, each]) => {
    const [kind, content] = Object.entries(each.content ?? {})[0] ?? ["", {}];
    return [code(status), each.description, code(kind === "application/json" ? type(content.schema, schemas) : kind)];
  })));
  return section;
}

fetch("/openapi.json").then((answer) => answer.json()).then((spec) => {
  const schemas = spec.components?.schemas ?? {};
  for (const [path, methods] of Object.entries(spec.paths)) {
    for (const [method, said] of Object.entries(methods)) {
      document.getElementById("operations").append(operation(path, method, said, schemas));
    }
  }
});
