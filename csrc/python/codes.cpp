#include "codes.h"

#include <stdexcept>
#include <string>

namespace qrlora {

namespace {

constexpr int64_t update_alone = 16, by_panels = 32;  // in a code, beside the column

const char* name_of(Operation operation) {
    const char* const names[] = {"low_rank", "kron", "linear_add"};
    return names[static_cast<int>(operation)];
}

const char* name_of(DType dtype) {
    const char* const names[] = {"fp32", "fp64", "bf16", "fp16"};
    return names[static_cast<int>(dtype)];
}

// Why the column does not do it; empty if it does.
std::string obstacle(const Column& column, const Demand& d) {
    const std::string name = column.name, in = std::string(" in ") + name_of(d.dtype);
    if (!column.obstacle().empty()) return name + " does not run here: " + column.obstacle();
    if (!column.dtypes.has(d.dtype))
        return name + " has no kernel for " + name_of(d.operation) + in;
    if (d.mixed && !column.mixes.has(d.dtype)) return name + " has no kernel for gates by row" + in;
    return "";
}

}  // namespace

Recipe recipe_of(int64_t code, const Demand& demand) {
    const auto refuse = [&](const std::string& reason) -> Recipe {
        throw std::runtime_error("code " + std::to_string(code) + ": " + reason);
    };
    const bool kron = demand.operation == Operation::kron;
    if (code == -1) return {Recipe::elsewhere, nullptr};
    if (code == 0 && kron) return refuse("kron has no step of library products alone");
    if (code == 0) return {Recipe::library, nullptr};
    const int64_t beside = code > by_panels ? by_panels : code > update_alone ? update_alone : 0;
    const int64_t at = code - 1 - beside;
    if (at < 0 || at >= static_cast<int64_t>(columns().size())) return refuse("no such column");
    if (beside == update_alone && !kron) return refuse("only kron has an update alone");
    if (beside == by_panels && demand.operation != Operation::low_rank)
        return refuse("only low_rank is a step by panels");
    const Column& column = columns()[static_cast<size_t>(at)];
    const std::string reason = obstacle(column, demand);
    if (!reason.empty()) return refuse(reason);
    const auto runs = beside == by_panels ? Recipe::by_panels
                      : beside            ? Recipe::update
                                          : Recipe::whole;
    return {runs, &column};
}

const Column& column_of(int64_t code, const Demand& demand) {
    const Recipe recipe = recipe_of(code, demand);
    if (!recipe.column)
        throw std::runtime_error("code " + std::to_string(code) + ": it names no column");
    return *recipe.column;
}

DType checked_dtype(int64_t number) {
    if (number < 0 || number > static_cast<int64_t>(DType::f16))
        throw std::runtime_error("no element type has the number " + std::to_string(number));
    return static_cast<DType>(number);
}

}  // namespace qrlora
