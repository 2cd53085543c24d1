/* Typed access to an operator's attributes, which MXNet passes as strings in Python's spelling. */
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace nkmx {

using Attrs = std::unordered_map<std::string, std::string>;

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

/* The attributes of one node. The accessors return `otherwise` if an attribute is absent and refuse invalid text. */
class Attributes {
 public:
  explicit Attributes(const Attrs& attrs) : attrs_(attrs) {}

  /* Refuse attributes of other names, except MXNet's own (__name__). */
  void require_known(std::initializer_list<const char*> names) const {
    for (const auto& item : attrs_) {
      bool known = item.first.compare(0, 2, "__") == 0;
      for (const char* name : names) known |= item.first == name;
      if (!known) {
        std::string all;
        for (const char* name : names) all += std::string(all.empty() ? "" : ", ") + name;
        refuse("no attribute '" + item.first + "'; expected one of " + all);
      }
    }
  }

  bool has(const char* name) const { return attrs_.count(name) != 0; }

  double number(const char* name, double otherwise) const {
    if (!has(name)) return otherwise;
    const std::vector<double> found = split(name);
    if (found.size() != 1) refuse_value(name, "a number");
    return found[0];
  }

  int64_t integer(const char* name, int64_t otherwise) const {
    const double found = number(name, static_cast<double>(otherwise));
    if (found != static_cast<double>(static_cast<int64_t>(found))) refuse_value(name, "an integer");
    return static_cast<int64_t>(found);
  }

  bool boolean(const char* name, bool otherwise) const {
    if (!has(name)) return otherwise;
    const std::string& text = attrs_.at(name);
    if (text == "True" || text == "true" || text == "1") return true;
    if (text == "False" || text == "false" || text == "0") return false;
    refuse_value(name, "True or False");
  }

  std::vector<double> numbers(const char* name, std::vector<double> otherwise) const {
    return has(name) ? split(name) : otherwise;
  }

  std::string text(const char* name, const char* otherwise) const { return has(name) ? attrs_.at(name) : otherwise; }

  [[noreturn]] void refuse_value(const char* name, const char* expected) const {
    refuse(std::string("attribute '") + name + "': expected " + expected + ", got '" + attrs_.at(name) + "'");
  }

 private:
  /* Parse the numbers of "(1.0, 2)", "[1]" or "1". */
  std::vector<double> split(const char* name) const {
    std::string text = attrs_.at(name);
    for (char& letter : text) {
      if (letter == '(' || letter == ')' || letter == '[' || letter == ']' || letter == ',') letter = ' ';
    }
    std::istringstream words(text);
    std::vector<double> found;
    for (std::string word; words >> word;) {
      char* end = nullptr;
      found.push_back(std::strtod(word.c_str(), &end));
      if (*end) refuse_value(name, "numbers");
    }
    return found;
  }

  const Attrs& attrs_;
};

}  // namespace nkmx
