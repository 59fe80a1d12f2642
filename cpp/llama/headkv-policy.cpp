#include "headkv-policy.h"

#include "llama-impl.h"

#include <numeric>
#include <stdexcept>

const std::vector<headkv_policy> & headkv_policy_list() {
#define HEADKV_CALL_POLICY(name) headkv_policy_##name(),
    static const std::vector<headkv_policy> policies = { HEADKV_POLICIES(HEADKV_CALL_POLICY) };
#undef HEADKV_CALL_POLICY
    return policies;
}

const headkv_policy & headkv_policy_find(const std::string & name) {
    std::string known;
    for (const auto & policy : headkv_policy_list()) {
        if (name == policy.name) {
            return policy;
        }
        known += (known.empty() ? "" : ", ") + std::string(policy.name);
    }
    throw std::invalid_argument(format("policy is '%s': it must be one of %s", name.c_str(), known.c_str()));
}

std::vector<float> headkv_score_recent(int64_t n_prefix) {
    std::vector<float> res(n_prefix);
    std::iota(res.begin(), res.end(), 0.0f); // exact below 2^24
    return res;
}
