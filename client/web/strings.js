// Every text of the page, in English and Chinese. {0}, {1} are filled in.

import { device } from "./storage.js";

const STRINGS = {
  "title": ["MindSpore LLM serving", "MindSpore 大模型服务"],
  "skip": ["To the message box", "跳到输入框"],

  "chats": ["Conversations", "对话"],
  "chats.open": ["Show conversations", "显示对话列表"],
  "chats.new": ["New conversation", "新对话"],
  "chats.untitled": ["Empty conversation", "空白对话"],
  "chats.delete": ["Delete “{0}”", "删除“{0}”"],
  "chats.deleted": ["Deleted “{0}”", "已删除“{0}”"],
  "chats.deleteAll": ["Delete all", "全部删除"],
  "chats.deletedAll": ["Deleted all conversations", "已删除全部对话"],
  "chats.deletedElsewhere": ["This conversation was deleted in another tab", "此对话已在另一个标签页中删除"],
  "chats.export": ["Export this conversation", "导出此对话"],
  "chats.private": ["Kept in this browser only", "仅保存在此浏览器中"],
  "chats.full": [
    "The browser’s storage is full: this conversation is not saved. Delete or export older ones.",
    "浏览器存储已满，此对话未保存。请删除或导出较早的对话。",
  ],
  "undo": ["Undo", "撤销"],
  "dismiss": ["Dismiss", "关闭"],
  "close": ["Close", "关闭"],

  "model": ["Model", "模型"],
  "model.none": ["No model", "无模型"],
  "theme.auto": ["Colours: as the system", "配色：跟随系统"],
  "theme.light": ["Colours: light", "配色：浅色"],
  "theme.dark": ["Colours: dark", "配色：深色"],
  "language": ["中文", "English"],
  "language.label": ["切换到中文", "Switch to English"],

  "log": ["Messages", "消息"],
  "empty.title": ["Ask the model something", "向模型提个问题"],
  "empty.text": [
    "It runs on the server behind this page. Nothing that you write leaves it, and the history stays in this browser.",
    "模型就运行在此页面背后的服务器上。内容不会离开服务器，历史记录只留在此浏览器中。",
  ],
  "empty.examples": [
    "What is the capital of France?|Write a haiku about the sea|List three prime numbers and say why they are prime",
    "法国的首都是哪里？|写一首关于大海的短诗|列出三个素数并说明理由",
  ],
  "you": ["You", "你"],
  "assistant": ["Answer", "回答"],
  "prompt": ["Message", "消息"],
  "prompt.placeholder": ["Write a message", "输入消息"],
  "prompt.hint": ["Enter sends, Shift+Enter starts a new line", "Enter 发送，Shift+Enter 换行"],
  "prompt.stopHint": ["Esc stops the answer", "按 Esc 停止回答"],
  "send": ["Send", "发送"],
  "stop": ["Stop", "停止"],
  "latest": ["To the latest message", "跳到最新消息"],
  "copy": ["Copy", "复制"],
  "copied": ["Copied", "已复制"],
  "copy.failed": ["The browser does not allow copying here", "浏览器不允许在此复制"],
  "copy.code": ["Copy code", "复制代码"],
  "edit": ["Edit", "编辑"],
  "edit.label": ["Edit the message", "编辑消息"],
  "edit.save": ["Send", "发送"],
  "edit.drop": ["Messages after this one are dropped.", "此后的消息将被删除。"],
  "cancel": ["Cancel", "取消"],
  "regenerate": ["Answer again", "重新回答"],
  "retry": ["Try again", "重试"],

  "task.done": ["Done", "已完成"],
  "task.open": ["To do", "未完成"],
  "thinking": ["Thinking", "正在思考"],
  "thought": ["What it thought", "思考过程"],
  "answering": ["Answering", "正在回答"],
  "answer.waiting": ["Waiting for the first token", "等待首个词元"],
  "answer.rate": ["{0} tokens/s", "{0} 词元/秒"],
  "answer.ttft": ["first token after {0}", "首个词元 {0}"],
  "answer.tokens": ["{0} tokens", "{0} 个词元"],
  "answer.atLeast": ["at least {0} tokens", "至少 {0} 个词元"],
  "answer.length": ["reached its limit of tokens", "已达词元上限"],
  "answer.stopped": ["stopped", "已停止"],
  "answer.empty": ["The model ended its answer at once.", "模型立即结束了回答。"],
  "answer.leftOut": ["this question is not sent along with the next one", "此问题不会随下一个问题发送"],
  "answer.done": ["Answer: {0}", "回答：{0}"],

  "error.away": ["The server cannot be reached.", "无法连接服务器。"],
  "error.cut": ["The connection broke before the answer was complete.", "回答尚未完成，连接已中断。"],
  "error.interrupted": ["The page was closed before the answer was complete.", "回答尚未完成，页面已关闭。"],
  "error.key": ["The server does not accept this API key.", "服务器不接受此 API 密钥。"],
  "error.busy": ["The server is busy and takes no more requests now.", "服务器繁忙，暂不接受更多请求。"],
  "error.late": ["The server did not get to it in time.", "服务器未能及时处理此请求。"],
  "error.unavailable": ["The server’s agents are not ready.", "服务器的代理进程尚未就绪。"],
  "error.stopping": ["The server is shutting down.", "服务器正在关闭。"],
  "error.long": [
    "This does not fit into the model’s context: shorten the question or the conversation, or ask for fewer tokens.",
    "内容超出模型的上下文长度：请缩短问题或对话，或减少最大词元数。",
  ],
  "error.refused": ["The server refuses this request.", "服务器拒绝了此请求。"],
  "error.failed": ["The server could not finish.", "服务器未能完成回答。"],

  "server.connecting": ["Connecting", "正在连接"],
  "server.ready": ["Ready", "就绪"],
  "server.starting": ["Waiting for the agents", "等待代理进程"],
  "server.draining": ["Shutting down", "正在关闭"],
  "server.away": ["Server away", "服务器离线"],
  "server.locked": ["Needs an API key", "需要 API 密钥"],
  "banner.away": ["The server is away. Trying again…", "服务器离线，正在重试…"],
  "banner.starting": [
    "The server waits for its agents; answers will be possible when they are ready.",
    "服务器正在等待代理进程，就绪后即可回答。",
  ],
  "banner.draining": ["The server is shutting down and takes no new requests.", "服务器正在关闭，不再接受新请求。"],
  "banner.locked": ["This server asks for an API key.", "此服务器需要 API 密钥。"],
  "banner.back": ["The server is back", "服务器已恢复"],

  "key.title": ["API key", "API 密钥"],
  "key.text": [
    "This server answers only who has its key. It is sent to this server and nowhere else.",
    "此服务器只回应持有密钥的人。密钥只会发送给此服务器。",
  ],
  "key.label": ["Key", "密钥"],
  "key.remember": ["Remember it on this device", "在此设备上记住"],
  "key.forget": ["Forget the key", "忘记密钥"],
  "key.save": ["Use this key", "使用此密钥"],
  "key.enter": ["Enter the key", "输入密钥"],

  "settings": ["Settings", "设置"],
  "settings.scope": [
    "Of this conversation. What is left empty is the server’s default.",
    "仅用于此对话。留空则使用服务器默认值。",
  ],
  "settings.system": ["System prompt", "系统提示词"],
  "settings.system.placeholder": ["How the model should answer", "希望模型如何回答"],
  "settings.temperature": ["Temperature", "温度"],
  "settings.top_p": ["Top p", "Top p"],
  "settings.top_k": ["Top k", "Top k"],
  "settings.max_tokens": ["Max tokens", "最大词元数"],
  "settings.seed": ["Seed", "随机种子"],
  "settings.stop": ["Stop at", "停止文本"],
  "settings.stop.hint": [
    "One text a line; the answer ends before it. \\n is a line break, \\\\ a backslash.",
    "每行一个，回答在其之前结束。\\n 表示换行，\\\\ 表示反斜杠。",
  ],
  "settings.allowed.number": ["A number from {0} to {1}", "{0} 到 {1} 之间的数"],
  "settings.allowed.above": ["A number above {0}, {1} at most", "大于 {0}、不超过 {1} 的数"],
  "settings.allowed.whole": ["A whole number from {0} to {1}", "{0} 到 {1} 之间的整数"],
  "settings.allowed.stop": ["{0} characters in a line at most", "每行最多 {0} 个字符"],
  "settings.notSent": ["Not sent: “{0}” in the settings cannot be used.", "未发送：设置中的“{0}”无效。"],
  "settings.default": ["default", "默认"],
  "settings.random": ["random", "随机"],
  "settings.reset": ["Back to defaults", "恢复默认"],

  "status": ["Status", "状态"],
  "status.none": ["No figures yet", "暂无数据"],
  "status.generation": ["Output", "输出"],
  "status.prompt": ["Input", "输入"],
  "status.running": ["Running", "运行中"],
  "status.waiting": ["Queue", "队列"],
  "status.cache": ["Cache", "缓存"],
  "status.rate": ["tokens/s", "词元/秒"],
  "status.of": ["of {0}", "/ {0}"],
  "status.requests": ["requests", "个请求"],
  "status.percent": ["% in use", "% 已用"],
  "status.window": ["The charts show the last {0}", "图表显示最近 {0}"],
  "status.chart": ["{0}: now {1} {2}, at most {3} lately", "{0}：当前 {1} {2}，近期最高 {3}"],
  "status.context": ["Context", "上下文"],
  "status.preemptions": ["Preemptions", "抢占次数"],
  "status.about": ["Version {0} · running for {1}", "版本 {0} · 已运行 {1}"],
  "status.agents": ["Agents", "代理进程"],
  "agent.ready": ["answers", "正常"],
  "agent.silent": ["connected, not ready", "已连接，未就绪"],
  "agent.away": ["not connected", "未连接"],
};

const LANGUAGES = ["en", "zh-CN"];
const KEY = "mindspore-ui/language";

export const language = () => document.documentElement.lang;

/** The text of a key in the language of the page. */
export function text(key, ...values) {
  return STRINGS[key][LANGUAGES.indexOf(language())].replace(/\{(\d)\}/g, (_, index) => values[index]);
}

/** A number as people write it in the language of the page. */
export function number(value, digits = 0) {
  const format = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return value.toLocaleString(language(), format);
}

/** A number with its unit, as short as it is clear: one of those that Intl knows. */
export function measure(value, unit, digits = 0) {
  const fraction = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return value.toLocaleString(language(), { style: "unit", unit, unitDisplay: "short", ...fraction });
}

/** Go to the other language, and remember it. */
export function switchLanguage() {
  document.documentElement.lang = LANGUAGES[1 - LANGUAGES.indexOf(language())];
  device.set(KEY, language());
}

/** Write the texts of the elements that name one: data-text, data-label, data-placeholder. */
export function localise() {
  document.title = text("title");
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = text(node.dataset.text);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = text(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", text(node.dataset.label));
    if (node.matches("button")) node.title = text(node.dataset.label);
  }
}
