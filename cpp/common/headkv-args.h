// The flags of the compression, on the parser that llama-server and llama-cli share.
#pragma once

#include "headkv.h"

#include <functional>
#include <map>
#include <string>
#include <vector>

struct common_arg;

constexpr const char * HEADKV_ARCHIVE_RAM = "ram";

// whether the server tells the text of prompts and which positions of it heads hold
enum headkv_tell_positions {
    HEADKV_POSITIONS_AUTO = 0, // where it listens on this machine alone
    HEADKV_POSITIONS_ON = 1,
    HEADKV_POSITIONS_OFF = 2,
};

// files of a page, as its folder has them
constexpr const char * HEADKV_PAGE_FILES[] = { "kv.html", "kv.css", "kv.js", "kv.svg" };

struct headkv_args {
    struct headkv_params params; // kv_size 0 = off; names and importance_gguf are those below
    std::string policy;
    std::string budget; // this and the next two: empty = the policy's own
    std::string rank;
    std::string fit;
    std::string question; // empty = later with reuse where the replay table is known, else known
    std::string importance; // GGUF file, empty = the model
    bool reuse = false;
    int32_t kv_size_max = 0; // of a request, 0 = kv_size
    int32_t kv_limit = 0; // tokens of a slot whose generated ones are bounded, 0 = as many as the model was trained with
    std::string archive; // folder, or HEADKV_ARCHIVE_RAM; empty = none
    struct headkv_archive_params archive_params; // but for the folder
    std::map<std::string, std::string> page; // files of the page at /kv by their names; empty = there is none
    int32_t positions = HEADKV_POSITIONS_AUTO;
    std::vector<std::string> given; // flags that were set, other than --kv-size

    bool has_archive() const { return !archive.empty(); }
    bool asks_question() const { return policy == "auto" && (budget.empty() || rank.empty()) && !is_lossless(); } // whether anything hangs on it
    // parameters that point to the names above
    headkv_params named() const;

    bool is_lossless() const; // nothing is dropped, without an amount
    std::string amount() const { return is_lossless() ? "--kv-policy lossless" : "--kv-size " + std::to_string(params.kv_size); }
};

// Those of the process: common_params, which belong to upstream, have no room for them.
headkv_args & headkv_get_args();

// Adds the flags, each with its environment variable. Called at the end of common_params_parser_init().
void headkv_add_args(const std::function<void(common_arg)> & add_opt);
