// The slots of llama-server when it was started with --kv-size. Included once, by server-context.cpp, behind its definition
// of server_slot and server_batch.
//
// Prompts are read one after the other, in the order of their requests, so that the staging holds one of them. A slot whose
// prompt is read layer by layer is PROCESSING_PROMPT with no token in its batch while it is read ahead, a while before each
// batch, until the batch has one step left to do; the slots that generate wait no longer than that, the client hears how far
// it is, and the request can be cancelled. Where prompts are not read layer by layer, short ones may share the end of a batch.
// Slots that generate are part of every batch. A prompt is compressed when its last token was decoded. What throws here ends
// the request of the slot with an error; the slot is cleared, others go on.
#pragma once

#include "headkv-server.h"
#include "headkv.h"

// Prompt tokens up to which a batch is filled: a whole prompt where it was read ahead.
static int32_t headkv_server_fill(const std::vector<server_slot> & slots, int32_t n_batch) {
    if (!headkv_server_is_on()) {
        return n_batch;
    }
    headkv_clear_error(); // what is found there after the batch belongs to it
    const bool whole = std::any_of(slots.begin(), slots.end(), [](const server_slot & slot) {
        return slot.state == SLOT_STATE_PROCESSING_PROMPT && slot.stats.headkv_info.by_layer;
    });
    return whole ? n_batch : std::min(n_batch, headkv_server_n_batch());
}

// A slot may be as long as what it holds lets it be.
static void headkv_server_update_n_ctx(server_slot & slot) {
    slot.n_ctx = headkv_server_n_ctx(slot.ctx_tgt, slot.id, headkv_server_n_ctx_of_prompts(slot.n_ctx));
}

// Before a slot is restored: what was not computed with these adapters is refused then, and what exceeds the slot.
// An answer whose tokens are bounded may be longer than the context of a slot.
static void headkv_server_before_restore(server_slot & slot, std::vector<common_adapter_lora_info> lora) {
    if (headkv_server_reuses()) {
        const int32_t n_ctx = headkv_server_n_ctx_of_prompts(slot.n_ctx);
        headkv_server_limit_restore(slot.ctx_tgt, n_ctx);
        slot.n_ctx = headkv_server_n_ctx_most(slot.ctx_tgt, n_ctx);
        common_set_adapter_lora(slot.ctx_tgt, lora);
    }
}

// After it. Upstream forgets what a slot holds when its adapters are not those of the next request.
static void headkv_server_after_restore(server_slot & slot, const std::vector<common_adapter_lora_info> & lora) {
    if (headkv_server_reuses()) {
        headkv_server_check_restored(slot.ctx_tgt, slot.id, slot.prompt.tokens.size());
        headkv_server_update_n_ctx(slot);
        slot.lora = lora;
    }
}

// Where the restoring of a slot failed, n_read bytes of the file were put in: it is as long as before, and whether it still holds what it held.
static bool headkv_server_keeps(server_slot & slot, size_t n_read) {
    if (headkv_server_reuses()) {
        headkv_server_update_n_ctx(slot);
    }
    return headkv_server_reuses() && n_read == 0 &&
            llama_memory_seq_pos_max(llama_get_memory(slot.ctx_tgt), slot.id) + 1 == slot.prompt.tokens.pos_next();
}

// Before a slot is filled from the prompt cache, for a request with these adapters.
static void headkv_server_before_load(server_slot & slot, const std::vector<common_adapter_lora_info> & lora) {
    if (headkv_server_reuses()) {
        headkv_server_before_restore(slot, lora);
        slot.lora = lora;
    }
}

// Whether the tokens before the invocation of an aLoRA are computed without it, in batches of their own.
static bool headkv_server_is_split(const server_slot & slot) {
    return lora_all_alora(slot.lora) && slot.alora_invocation_start > 1;
}

// Before a slot's prompt is begun. false = it has to wait for its turn.
static bool headkv_server_begin(const std::vector<server_slot> & slots, server_slot & slot, const server_batch & batch, int32_t n_batch) {
    if (!headkv_server_is_on() || slot.state != SLOT_STATE_STARTED) {
        return true;
    }
    int32_t n_staged = 0; // prompts that end in this batch
    for (const auto & other : slots) {
        const bool is_first = other.state == SLOT_STATE_STARTED && other.task->id < slot.task->id;
        if (other.state == SLOT_STATE_PROCESSING_PROMPT || is_first) {
            return false;
        }
        n_staged += other.state == SLOT_STATE_DONE_PROMPT ? other.task->n_tokens() : 0;
    }
    const int32_t n_tokens = slot.task->n_tokens();
    const bool layers = headkv_server_by_layer(slot.ctx_tgt);
    const bool fits = batch.size() + n_tokens <= (int32_t) llama_n_batch(slot.ctx_tgt);
    const bool shares = !layers && batch.size() + n_tokens <= n_batch && n_staged + n_tokens <= (int32_t) llama_n_ctx(slot.ctx_tgt);
    if (n_staged > 0 && !shares) {
        return false;
    }
    if (layers && !fits && batch.size() > 0 && headkv_server_only_layer()) {
        return false; // the last slots of a nearly full context have to finish
    }

    headkv_server_begin_turn(slot.id, slot.task->id, n_tokens);
    const int32_t n_ctx = headkv_server_n_ctx_of_prompts(slot.n_ctx);
    slot.n_ctx = n_ctx;
    if (headkv_server_reuses() && slot.task->params.cache_prompt && slot.prompt.n_tokens() > 0) {
        const int32_t n_past = std::min((int32_t) slot.prompt.tokens.get_common_prefix(slot.task->tokens), n_tokens - 1);
        common_set_adapter_lora(slot.ctx_tgt, slot.lora);
        const std::string why_not = slot.alora_invocation_start > 0 ? "an aLoRA is invoked in it"
                                                                    : headkv_server_why_not_continued(slot.ctx_tgt, slot.id, n_past, n_tokens, slot.task->params.headkv);
        if (why_not.empty()) {
            SLT_INF(slot, "--kv-reuse: %d of %d tokens are continued on the compressed past\n", n_past, n_tokens);
            slot.n_ctx = headkv_server_n_ctx(slot.ctx_tgt, slot.id, n_ctx);
            headkv_server_drop_ranges(slot.ctx_tgt, slot.id, slot.task->params.headkv, n_past); // before what is new sees it
            return true;
        }
        SLT_INF(slot, "--kv-reuse: the prompt is read from its beginning: %s\n", why_not.c_str());
    }
    if (n_tokens == 0 || n_tokens >= slot.n_ctx) {
        return true; // upstream refuses it, and the slot keeps what it has
    }
    if (headkv_server_is_split(slot) && headkv_server_only_layer()) {
        throw std::runtime_error("--kv-prefill layer: one part of the prompt is computed without the aLoRA and the other one with it, "
                                 "which no order by layers can do: use --kv-prefill auto");
    }
    slot.prompt_clear();
    slot.stats.headkv_info.by_layer = layers && fits && n_tokens > 1 && !headkv_server_is_split(slot);
    headkv_server_announce(slot.ctx_tgt, slot.id, n_tokens, slot.stats.headkv_info.by_layer, slot.task->params.headkv);
    return true;
}

// Before the tokens of a slot's prompt go into the batch: reads ahead in it. false = there is more to read, or no room yet.
// report: tells the client how many tokens are read; after a batch upstream does it.
template <typename F>
static bool headkv_server_read(server_slot & slot, const server_batch & batch, int32_t n_batch, server_metrics & metrics, F && report) {
    headkv_slot_info & info = slot.stats.headkv_info;
    if (!info.by_layer) {
        return true;
    }
    const int32_t n_tokens = slot.task->n_tokens();
    const int64_t t_start = ggml_time_us();
    common_set_adapter_lora(slot.ctx_tgt, slot.lora); // upstream sets those of the batch, when it is complete
    const bool is_ahead = headkv_server_read_ahead(slot.ctx_tgt, slot.id, slot.task->tokens.get_text_tokens(), info);
    slot.stats.update_prompt_last();
    slot.stats.n_prompt_cached = info.n_archived;
    headkv_server_note_turn(slot.id, slot.stats);
    metrics.add_prompt(0, slot.stats.t_prompt_last - t_start); // its tokens are counted with the batch
    if (!is_ahead || batch.size() + n_tokens > n_batch) {
        if (slot.stats.t_prompt_last - std::max(slot.t_print_last, slot.stats.t_start) > 3 * 1000 * 1000) {
            slot.t_print_last = slot.stats.t_prompt_last;
            SLT_INF(slot, "prompt processing, layer by layer, progress = %.2f, t = %6.2f s\n", (double) info.n_read / n_tokens, slot.stats.t_prompt_ms() / 1e3);
        }
        if (slot.task->params.stream && slot.task->params.return_progress && batch.size() == 0) {
            report();
        }
        return false;
    }
    headkv_server_announce_end(slot.ctx_tgt, slot.id, n_tokens);
    metrics.add_prompt_cached(info.n_archived);
    metrics.add_prompt(-(uint64_t) info.n_archived, 0); // they are counted with the batch, which is the whole prompt
    return true;
}

// Tokens of a slot's prompt that were processed, n of them in batches.
static int32_t headkv_server_n_read(const server_slot & slot, int32_t n) {
    return std::max(n, slot.stats.headkv_info.n_read);
}

// After the last token of the slot's prompt was decoded, before its first token is sampled.
static void headkv_server_end(server_slot & slot, server_metrics & metrics) {
    if (headkv_server_is_on() && slot.state == SLOT_STATE_DONE_PROMPT) {
        const bool is_noted = slot.stats.headkv_info.by_layer; // when it was read ahead
        slot.stats.headkv_info = headkv_server_compress(slot.ctx_tgt, slot.id);
        if (!slot.task->params.headkv.drop.empty()) {
            headkv_server_drop_ranges(slot.ctx_tgt, slot.id, slot.task->params.headkv, slot.prompt.n_tokens());
            slot.stats.headkv_info = headkv_server_note(slot.ctx_tgt, slot.id);
        }
        headkv_server_update_n_ctx(slot);
        if (!is_noted) {
            metrics.add_prompt_cached(slot.stats.headkv_info.n_archived);
            metrics.add_prompt(-(uint64_t) slot.stats.headkv_info.n_archived, 0);
            slot.stats.n_prompt_cached += slot.stats.headkv_info.n_archived;
        }
        // upstream counts the tokens of a batch, which is the whole prompt
        slot.stats.n_prompt_processed -= slot.stats.headkv_info.n_archived;
    }
}

// Ends the request of a slot and takes its tokens out of the rest of a batch.
template <typename F>
static void headkv_server_drop_slot(std::vector<server_slot> & slots, server_batch & batch, int32_t off, server_slot & slot, F && fail) {
    auto & tokens = batch.tokens;
    const auto is_own = [&](const server_batch::token & t) { return t.id_slot == slot.id; };
    const auto begin = std::find_if(tokens.begin() + off, tokens.end(), is_own);
    const auto end = std::find_if_not(begin, tokens.end(), is_own);
    for (auto & other : slots) {
        other.i_batch -= other.i_batch >= end - tokens.begin() ? (int32_t) (end - begin) : 0;
    }
    tokens.erase(begin, end);
    fail(slot);
}

// After a batch that failed: ends the requests that made it fail and takes back what the others have computed.
// true = the rest of the batch can be decoded again, n_batch tokens of it first.
template <typename F>
static bool headkv_server_drop(std::vector<server_slot> & slots, server_batch & batch, int32_t off, int32_t ret, int32_t & n_batch, F && fail) {
    auto & tokens = batch.tokens;
    if (!headkv_server_is_on() || (ret != 1 && ret >= -1) || batch.has_embd || !*headkv_last_error()) {
        return false;
    }
    const auto is_prompt = [](const server_batch::token & t) { return t.is_prompt; };
    const auto end = tokens.begin() + off + batch.view.size();
    const int32_t n_others = std::find_if(tokens.begin() + off, end, is_prompt) - tokens.begin() - off; // they come first
    if (ret == 1) {
        // no memory, and nothing was computed: upstream tries again with fewer tokens, down to one
        if (n_others > 0 && n_others < batch.view.size()) {
            n_batch = n_others; // a prompt that is read layer by layer cannot be divided
        } else if (n_batch > 1) {
            return false;
        } else {
            headkv_server_drop_slot(slots, batch, off, slots[tokens[off].id_slot], fail);
        }
    } else {
        // a layer of a prompt could not be compressed
        if (n_others == batch.view.size()) {
            return false;
        }
        while ((int32_t) tokens.size() > off && tokens.back().is_prompt) {
            headkv_server_drop_slot(slots, batch, off, slots[tokens.back().id_slot], fail);
        }
        for (size_t i = off; i < tokens.size(); ++i) {
            slots[tokens[i].id_slot].mem.seq_rm(tokens[i].id_slot, tokens[i].pos, -1);
        }
    }
    headkv_clear_error();
    return true;
}

// After a batch. Timings have what the prompt was compressed to, and how often what is said was evicted since then.
static void headkv_server_note_slots(std::vector<server_slot> & slots) {
    for (auto & slot : slots) {
        if (headkv_server_is_on() && slot.is_processing()) {
            const headkv_slot_info now = headkv_server_note(slot.ctx_tgt, slot.id);
            slot.stats.headkv_info.n_evictions = now.n_evictions;
            slot.stats.headkv_info.n_evicted_generated = now.n_evicted_generated;
            headkv_server_note_turn(slot.id, slot.stats);
        }
    }
}

struct headkv_result : server_task_result {
    json to_json() override { return {}; } // the answer is in the view
};

// Between two batches: what the page asks of a slot. Upstream's own tasks of the kind ask nothing.
static void headkv_server_look(const std::vector<server_slot> & slots, const server_task & task, server_response & results) {
    headkv_view * view = task.params.headkv.view.get();
    if (!view) {
        return;
    }
    if (view->id_slot < 0 || (size_t) view->id_slot >= slots.size()) {
        view->error = string_format("slot is %d: it must be in [0, %zu)", view->id_slot, slots.size());
    } else {
        const server_slot & slot = slots[view->id_slot];
        try {
            headkv_server_fill_view(slot.ctx_tgt, slot.prompt.tokens.get_tokens(), *view);
        } catch (const std::exception & e) {
            view->error = e.what();
        }
    }
    auto res = std::make_unique<headkv_result>();
    res->id = task.id;
    results.send(std::move(res));
}
